"""The engine thread's own rules where it launches each step before it has read the last one's results."""

from functools import partial
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.engine.request import Sampled, Sampling
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import IN_FLIGHT, Sequence
from tests.served import DONE, FAILED, AheadModel, Model, Served, name, on_its_clock, requests, tokens, words
from tests.test_thread import end, request, text


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> AheadModel:
    return ahead_with(monkeypatch)


def ahead_with(monkeypatch: pytest.MonkeyPatch, **options: Any) -> AheadModel:
    model = AheadModel(**options)
    on_its_clock(model, monkeypatch)
    return model


def counted(served: Served, id: str) -> bool:
    """Whether the tokens told at the end are those whose text was told."""
    return end(served.parts[id]).completion_tokens == len(served.texts[id])


def test_a_step_is_launched_before_the_last_one_is_read(ahead: AheadModel):
    Served(ahead, request("a", "hi")).run()
    # The end comes with the third token; by then a fourth is on its way, for nothing.
    assert ", ".join(ahead.calls) == "launch 1, launch 2, read 1, launch 3, read 2, launch 4, read 3, read 4"


def test_one_whose_last_token_is_on_its_way_gets_no_other_step(ahead: AheadModel):
    served = Served(ahead, request("a", "hello", max_tokens=2), request("b", "hello", max_tokens=1)).run()
    assert ", ".join(ahead.calls) == "launch 1, launch 2, read 1, read 2"
    assert ahead.steps == [[("a", 0, 5), ("b", 0, 5)], [("a", 5, 6)]]
    assert (served.texts, set(served.ends.values())) == ({"a": "he", "b": "h"}, {("length", None)})


def test_what_was_computed_for_one_that_had_ended_is_dropped_and_its_slot_free_after_one_step(ahead: AheadModel):
    served = Served(ahead, request("a", "hi"), request("b", "you"), capacity=1).run()
    assert ahead.steps_of("a") == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert [{part for part, _, _ in batch} for batch in ahead.steps[3:5]] == [{"a"}, {"b"}]
    assert (served.texts, set(served.ends.values())) == ({"a": "hi", "b": "you"}, {DONE})
    assert [end(served.parts[id]).completion_tokens for id in "ab"] == [3, 4]


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_step_that_needs_the_last_tokens_waits_for_them(ahead: AheadModel, penalty: str):
    penalised = request("p", "abc", sampling=Sampling(**{penalty: 1.5}))
    served = Served(ahead, penalised, request("long", "a longer text")).run()
    assert served.texts == {"p": "abc", "long": "a longer text"}
    assert ahead.calls[:8] == [f"{call} {n}" for n in range(1, 5) for call in ("launch", "read")]
    assert ahead.calls[8:11] == ["launch 5", "launch 6", "read 5"], "once it has gone the others run ahead"
    assert len(ahead.steps_of("p")) == 4


@pytest.mark.parametrize(
    ("step", "said"),
    [(1, ""), (2, ""), (5, ""), (6, ""), (7, "y"), (8, "yy"), (9, "yyy")],
    ids=["begins", "pauses", "in prefill", "ends its prefill", "decodes", "goes on", "last token in flight"],
)
def test_a_cancel_beside_a_step_in_flight_launches_nothing_more_for_it(ahead: AheadModel, step: int, said: str):
    ahead.max_prefill = 64
    asked = request("first", "z"), request("a", "y" * 250, max_tokens=4), request("last", "later")
    served = Served(ahead, *asked, capacity=2)
    ahead.during = {step: lambda: served.cancel("a")}
    served.run()
    assert sum("a" in map(itemgetter(0), batch) for batch in ahead.steps[step:]) == 0
    assert served.texts["a"] == said
    assert served.ends["a"] == ("cancelled", None)
    assert counted(served, "a")
    assert served.steps_at["a"] == step
    assert (served.texts["first"], served.texts["last"]) == ("z", "later")


@pytest.mark.parametrize("step", [1, 2, 9])
def test_all_can_be_cancelled_beside_a_step_in_flight_and_nothing_is_left_to_be_read(ahead: AheadModel, step: int):
    served = Served(ahead, *requests(words(40, length=30)), capacity=4)
    ahead.during = {step: lambda: served.cancel(words(40))}
    served.run()
    assert set(served.ends.values()) == {("cancelled", None)}
    assert ahead.tried == step
    assert all(counted(served, id) for id in served.parts)
    assert not ahead.unread
    served.open(request("next"))
    served.worker.run()
    assert served.ends["next"] == DONE


def test_a_key_opened_again_gets_nothing_of_what_was_in_flight_for_its_last_request(ahead: AheadModel):
    served = Served(ahead, request("a", "the old text"), request("b", "beside"))
    old = served.parts["a"]
    ahead.during = {4: lambda: (served.cancel("a"), served.open(request("a", "new")))}
    served.worker.run()
    assert (text(old), end(old).reason, end(old).completion_tokens) == ("the", "cancelled", 3)
    assert served.texts == {"a": "new", "b": "beside"}
    assert end(served.parts["a"]).completion_tokens == 4


@pytest.mark.parametrize(("seconds", "said"), [(8, ""), (60, "y")], ids=["in prefill", "in decode"])
def test_a_deadline_is_kept_beside_a_step_in_flight(ahead: AheadModel, seconds: float, said: str):
    ahead.max_prefill = 64
    late = request("late", "y" * 300, deadline=ahead.clock + seconds)
    served = Served(ahead, request("a", "x" * 60), late).run()
    assert served.ends == {"a": DONE, "late": ("timeout", None)}
    assert (served.texts["late"][:1], served.texts["a"]) == (said, "x" * 60)
    assert counted(served, "late")


def test_logits_that_are_no_numbers_fail_their_own_request_alone_also_when_its_next_step_was_launched(ahead: AheadModel):
    asked = words(4)
    ahead.spoils = lambda part, sampled: Sampled(None) if name(part) == "1" and part.stop >= 27 else sampled
    served = Served(ahead, *requests(asked)).run()
    assert served.ends == {id: FAILED if id == "1" else DONE for id in asked}
    assert served.texts == {**asked, "1": asked["1"][:7]}
    assert counted(served, "1")
    assert ahead.steps_of("1")[-1] == (27, 28)


@pytest.mark.parametrize("step", [1, 2, 9])
@pytest.mark.parametrize("where", ["launch", "read"])
def test_an_exception_ends_what_runs_and_not_what_waits_also_when_steps_are_launched_ahead(
    ahead: AheadModel, where: str, step: int
):
    asked = words(6)
    error = RuntimeError("a kernel failed")
    if where == "launch":
        ahead.fails = lambda batch: error if ahead.tried == step else None
    else:
        ahead.fails_reading = lambda number: error if number == step else None
    served = Served(ahead, *requests(asked), capacity=4).run()
    assert served.ends == {id: FAILED if id in "0123" else DONE for id in asked}
    assert {id: served.texts[id] for id in "45"} == {id: asked[id] for id in "45"}
    assert all(counted(served, id) for id in "0123")
    assert not ahead.unread


def test_one_that_was_preempted_beside_a_step_that_fails_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    asked = words(12)
    preempted_in_flight = 0
    for step in range(4, 60):
        ahead = ahead_with(monkeypatch, block_count=6)
        served = Served(ahead, *requests(asked, max_tokens=30), capacity=5)
        line = served.worker._scheduler

        def failing(number: int, step: int = step, line: Scheduler = line) -> Exception | None:
            nonlocal preempted_in_flight
            if number != step:
                return None
            preempted_in_flight += any(s.token_ids[-1] == IN_FLIGHT for s in line.waiting)
            return RuntimeError("a kernel failed")

        ahead.fails_reading = failing
        caplog.clear()
        served.run()
        assert sum("the model raised" in record.message for record in caplog.records) == 1
        assert {id: served.texts[id] for id, end in served.ends.items() if end == DONE}.items() <= asked.items()
    assert preempted_in_flight


@pytest.mark.parametrize(("most", "length"), [(2, 20), (1, 20), (70, 200)])
def test_a_launch_that_finds_no_memory_loses_nothing_of_the_step_in_flight(ahead: AheadModel, most: int, length: int):
    asked = words(5, length=length)
    size = tokens if length > 20 else len
    ahead.fails = lambda batch: MemoryError() if size(batch) > most else None
    served = Served(ahead, *requests(asked), capacity=4)
    if length == 20:
        # Not from the beginning: there has to be a step in flight.
        ahead.fails = lambda batch: MemoryError() if ahead.tried > 5 and len(batch) > most else None
    served.run()
    assert (set(served.ends.values()), served.texts) == ({DONE}, asked)
    assert ahead.tried > len(ahead.steps)


def test_one_too_large_alone_fails_beside_its_own_step_in_flight(ahead: AheadModel):
    ahead.fails = lambda batch: MemoryError() if batch[0].sequence.completion_tokens == 7 else None
    served = Served(ahead, request("a", "hello world")).run()
    assert served.ends == {"a": FAILED}
    assert served.texts["a"] in ("hello ", "hello w")
    assert counted(served, "a")
    assert not ahead.unread


@pytest.fixture
def preempted_in_flight(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whoever was preempted while a token of theirs was in flight."""
    seen, preempt = [], Scheduler._preempt

    def watched(scheduler: Scheduler, sequence: Sequence) -> None:
        if sequence.token_ids[-1] == IN_FLIGHT:
            seen.append(sequence.request.key[1])  # type: ignore[index]
        preempt(scheduler, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", watched)
    return seen


@pytest.mark.parametrize("reuses_blocks", [False, True])
@pytest.mark.parametrize("block_count", [4, 6, 8])
def test_whoever_is_preempted_with_a_token_in_flight_gets_the_whole_text_once(
    monkeypatch: pytest.MonkeyPatch, preempted_in_flight: list[str], block_count: int, reuses_blocks: bool
):
    model = ahead_with(monkeypatch, block_count=block_count, reuses_blocks=reuses_blocks, max_prefill=24)
    asked = {id: prompt[: 3 + 5 * int(id) % 26] for id, prompt in words(12, length=40).items()}
    served = Served(model, *requests(asked, max_tokens=30), capacity=5).run()
    assert (set(served.ends.values()), served.texts) == ({DONE}, asked)
    assert len(preempted_in_flight) > 1


@pytest.mark.parametrize(("block_count", "step"), [(5, 3), (6, 19), (7, 19)])
def test_what_may_be_no_numbers_is_not_found_again_also_when_its_blocks_were_lost_meanwhile(
    monkeypatch: pytest.MonkeyPatch, preempted_in_flight: list[str], block_count: int, step: int
):
    model = ahead_with(monkeypatch, block_count=block_count, reuses_blocks=True)
    spoilt = lambda part: name(part) == "b" and model.tried >= step  # noqa: E731
    model.spoils = lambda part, sampled: Sampled(None) if spoilt(part) else sampled
    asked = [request(id, prompt * 30, max_tokens=40) for id, prompt in (("a", "x"), ("b", "y"))]
    served = Served(model, *asked)
    served.then = lambda id: served.open(request("again", "y" * 30, max_tokens=3)) if id == "b" else None
    served.run()
    assert preempted_in_flight == ["b"]
    assert served.ends["b"] == FAILED
    assert end(served.parts["again"]).cached_tokens == 0


@pytest.mark.parametrize("step", [1, 5])
def test_a_shutdown_does_not_wait_for_the_step_in_flight(ahead: AheadModel, step: int):
    served = Served(ahead, *requests(words(5, length=30)), capacity=4)
    ahead.during = {step: served.close}
    served.run()
    assert set(served.ends.values()) == {("shutdown", None)}
    assert ahead.tried == step
    assert all(counted(served, id) for id in served.parts)


@st.composite
def walks(draw: st.DrawFn) -> dict[str, Any]:
    """Give requests and what happens to them: `when` each cancel comes, `memory` for so many slices in a step."""
    asked = []
    for number in range(draw(st.integers(1, 8))):
        prompt = "".join(draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=40)))
        sampling = Sampling(presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])))
        stop = draw(st.sampled_from([(), (), ("bab",)]))
        asked.append(request(str(number), prompt, draw(st.integers(1, 50)), sampling=sampling, stop=stop))
    options = {"block_count": draw(st.sampled_from([6, 8, 20])), "reuses_blocks": draw(st.booleans())}
    return {
        "asked": asked,
        "options": options | {"max_prefill": draw(st.sampled_from([8, 24, 256]))},
        "capacity": draw(st.integers(1, 5)),
        "memory": draw(st.sampled_from([99, 99, 1, 2])),
        "cancels": draw(st.dictionaries(st.integers(1, 60), st.sampled_from([str(n) for n in range(8)]), max_size=4)),
        "late": draw(st.dictionaries(st.integers(1, 30), st.text("ab", min_size=1, max_size=20), max_size=3)),
    }


def walk(model: Model, asked: Any, options: Any, capacity: int, memory: int, cancels: Any, late: Any) -> Served:
    with pytest.MonkeyPatch.context() as patch:
        on_its_clock(model, patch)
        served = Served(model, *asked, capacity=capacity)
        model.fails = lambda batch: MemoryError() if len(batch) > memory else None

        def act(step: int) -> None:
            served.cancel([id for at, id in cancels.items() if at == step and id in served.parts])
            served.open(*[request(f"late {at}", prompt) for at, prompt in late.items() if at == step])

        model.during = {step: partial(act, step) for step in {*cancels, *late}}
        return served.run()


@settings(max_examples=60, deadline=None)
@given(walks())
def test_whatever_happens_the_texts_are_those_of_one_step_after_the_other(happening: dict[str, Any]):
    steadily = walk(Model(**happening["options"]), **happening)
    model = AheadModel(**happening["options"])
    served = walk(model, **happening)
    assert not model.unread
    for id in {*served.parts} & {*steadily.parts}:
        if "cancelled" in (served.ends[id][0], steadily.ends[id][0]):
            short, long = sorted((served.texts[id], steadily.texts[id]), key=len)
            assert long.startswith(short)
        else:
            assert (served.texts[id], served.ends[id]) == (steadily.texts[id], steadily.ends[id])
            assert end(served.parts[id]).completion_tokens == end(steadily.parts[id]).completion_tokens
