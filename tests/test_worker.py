"""The engine thread's own rules: memory that runs out, a model that fails, deadlines, too many, blocks, cancels."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from LLM.engine.request import Finished, Prefill, Queued, Sampled, Started
from tests.served import DONE, FAILED, AheadModel, Model, Served, name, on_its_clock, requests, tokens, words
from tests.test_thread import end, request


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return on_its_clock(Model(), monkeypatch)


# Memory runs out.


def test_a_step_too_large_for_the_memory_is_tried_again_with_fewer_prompt_tokens(model: Model):
    asked = words(3, length=200)
    model.fails = lambda batch: MemoryError() if tokens(batch) > 70 else None
    served = Served(model, *requests(asked)).run()
    assert (set(served.ends.values()), served.texts) == ({DONE}, asked)
    assert (model.tried - len(model.steps), max(len(batch) for batch in model.steps)) == (2, 3)
    assert max(sum(stop - start for _, start, stop in batch) for batch in model.steps) <= 64 + 2
    assert model.notes == ["a note of before", "ran out of memory: at most 64 prompt tokens and 4 sequences in a step"]


def test_where_fewer_prompt_tokens_do_not_help_one_sequence_less_runs_at_once(model: Model):
    asked = words(5)
    model.fails = lambda batch: MemoryError() if len(batch) > 2 else None
    served = Served(model, *requests(asked), capacity=4).run()
    assert (set(served.ends.values()), served.texts) == ({DONE}, asked)
    assert {len(batch) for batch in model.steps} == {1, 2}
    assert model.notes[1:] == ["ran out of memory: at most 8 prompt tokens and 2 sequences in a step"]


def test_streams_alone_that_need_too_much_lose_the_youngest_not_their_prompts_budget(model: Model):
    asked = words(3)
    model.fails = lambda batch: MemoryError() if model.tried == 5 and len(batch) == 3 else None
    served = Served(model, *requests(asked)).run()
    assert (set(served.ends.values()), served.texts) == ({DONE}, asked)
    assert model.notes[1:] == ["ran out of memory: at most 256 prompt tokens and 2 sequences in a step"]
    # The last one was computed again, and told nothing of it.
    assert [start for start, _ in model.steps_of("2")].count(0) == 2
    assert [start for start, _ in model.steps_of("0")].count(0) == 1


@pytest.mark.parametrize("hungry", ["0", "1", "2"])
def test_one_that_runs_out_of_memory_even_alone_fails_and_no_other(model: Model, hungry: str):
    asked = words(4)
    model.fails = lambda batch: MemoryError() if hungry in map(name, batch) else None
    served = Served(model, *requests(asked)).run()
    assert served.ends == {id: FAILED if id == hungry else DONE for id in asked}
    assert {id: told for id, told in served.texts.items() if id != hungry} == {i: t for i, t in asked.items() if i != hungry}
    # Whoever comes next has all the room there was: too large alone is no reason to keep others apart.
    served.open(request("8"), request("9"))
    model.steps.clear()
    served.worker.run()
    assert max(map(len, model.steps)) == 2
    assert model.notes == ["a note of before"]


def test_one_that_runs_out_of_memory_in_the_middle_of_its_text_keeps_what_it_said(model: Model):
    model.fails = lambda batch: MemoryError() if batch[0].sequence.completion_tokens == 7 else None
    served = Served(model, request("a", "hello world")).run()
    assert (served.ends, served.texts) == ({"a": FAILED}, {"a": "hello w"})


# The model fails otherwise.


def test_an_exception_ends_what_runs_and_not_what_waits(model: Model):
    asked = words(6)
    model.fails = lambda batch: RuntimeError("a kernel failed") if model.tried == 9 else None
    served = Served(model, *requests(asked), capacity=4).run()
    assert served.ends == {id: FAILED if id in "0123" else DONE for id in asked}
    assert {id: served.texts[id] for id in "45"} == {id: asked[id] for id in "45"}
    assert (model.steps_of("4")[0], model.steps_of("5")[0]) == ((0, 20), (0, 20))


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), None])
def test_nothing_is_found_again_of_what_a_cache_held_when_the_model_failed(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
):
    model = on_its_clock(Model(reuses_blocks=True), monkeypatch)
    prompt = "x" * 90
    model.fails = lambda batch: error if model.tried == 25 else None
    served = Served(model, request("first", prompt, max_tokens=20), request("failing", "y" * 30))
    served.then = lambda id: served.open(request("again", prompt)) if id == "failing" else None
    served.run()
    assert served.ends == {"first": ("length", None), "failing": FAILED if error else DONE, "again": DONE}
    assert end(served.parts["again"]).cached_tokens == (0 if error else 80)
    assert served.texts["again"] == prompt


def test_logits_that_are_no_numbers_fail_their_own_request_alone(model: Model):
    asked = words(4)
    model.spoils = lambda part, sampled: Sampled(None) if (name(part), part.stop) == ("1", 27) else sampled
    served = Served(model, *requests(asked)).run()
    assert served.ends == {id: FAILED if id == "1" else DONE for id in asked}
    assert served.texts == {**asked, "1": asked["1"][:7]}
    assert end(served.parts["1"]).completion_tokens == 7
    assert len(model.steps) == model.tried


def test_what_may_be_no_numbers_is_not_found_again(monkeypatch: pytest.MonkeyPatch):
    model, prompt = on_its_clock(Model(reuses_blocks=True), monkeypatch), "x" * 90
    served = Served(model, request("a", prompt))
    served.then = lambda id: served.open(request("again", prompt)) if id == "a" else None
    model.spoils = lambda part, sampled: Sampled(None) if name(part) == "a" else sampled
    served.run()
    assert served.ends == {"a": FAILED, "again": DONE}
    assert end(served.parts["again"]).cached_tokens == 0


# Deadlines.


@pytest.mark.parametrize(
    ("capacity", "seconds", "said"),
    [(1, 8, None), (2, 8, ""), (2, 60, "yy")],
    ids=["in line", "in prefill", "in decode"],
)
def test_a_request_ends_at_its_deadline_wherever_it_is(model: Model, capacity: int, seconds: float, said: str | None):
    model.max_prefill = 64
    late = request("late", "y" * 300, deadline=model.clock + seconds)
    served = Served(model, request("a", "x" * 60), late, request("c", "z" * 60), capacity=capacity).run()
    assert served.ends == {"a": DONE, "late": ("timeout", None), "c": DONE}
    assert served.texts["late"].startswith(said or "")
    assert bool(served.texts["late"]) == bool(said)
    assert any(isinstance(part, Started) for part in served.parts["late"]) == (said is not None)
    assert end(served.parts["late"]).timings.total >= seconds
    assert (served.texts["a"], served.texts["c"]) == ("x" * 60, "z" * 60)


def test_a_deadline_that_is_past_when_a_request_comes_computes_nothing(model: Model):
    served = Served(model, request("late", deadline=model.clock), request("b", deadline=model.clock + 1e6)).run()
    assert served.ends == {"late": ("timeout", None), "b": DONE}
    assert model.steps_of("late") == []


def test_one_that_was_preempted_ends_at_its_deadline_in_line(monkeypatch: pytest.MonkeyPatch):
    model = on_its_clock(Model(block_count=4), monkeypatch)
    late = request("late", "y" * 20, max_tokens=30, deadline=model.clock + 35)
    served = Served(model, request("a", "x" * 30, max_tokens=35), late, capacity=2).run()
    assert served.ends == {"a": DONE, "late": ("timeout", None)}
    assert served.texts["a"] == "x" * 30
    ran = len(model.steps_of("late"))
    assert 0 < ran == len(served.texts["late"]) < 20, "it had begun"
    assert model.steps_of("a")[-1][1] > model.steps_of("a")[ran][1], "and then it waited"
    assert served.steps_at["late"] < model.tried


def test_the_inbox_is_not_waited_for_while_anybody_is_in_line(monkeypatch: pytest.MonkeyPatch):
    """So none is waited for past a deadline: with somebody in line there is a step to make, or one in flight."""
    for runner in (Model, AheadModel):
        model = on_its_clock(runner(block_count=4, max_prefill=24), monkeypatch)
        served = Served(model, *requests(words(9, length=30), max_tokens=30, deadline=model.clock + 100), capacity=5)
        take = served._inbox.get

        def get(served: Served = served, take: Callable[[], Any] = take) -> Any:
            assert not served._inbox.empty() or served.worker._scheduler.idle
            return take()

        inbox = SimpleNamespace(get=get, put=served._inbox.put, empty=served._inbox.empty)
        served.worker._inbox = inbox  # type: ignore[assignment]
        served.run()
        assert {reason for reason, _ in served.ends.values()} >= {"timeout"}


# Too many.


def test_one_too_many_is_refused_and_who_has_most_in_line_loses_the_last(model: Model):
    heavy = [request(id, owner="heavy") for id in "abcde"]
    served = Served(model, *heavy, capacity=1, max_queue=3)
    model.during = {1: lambda: served.open(request("light", owner="light"))}
    served.run()
    assert served.ends == dict.fromkeys(["a", "b", "c", "light"], DONE) | dict.fromkeys("de", ("error", "overloaded"))
    assert served.parts["d"][0] == Queued(3), "it had been in line"
    assert len(served.parts["e"]) == 1
    firsts = [part for batch in model.steps for part, start, _ in batch if start == 0]
    assert firsts == ["a", "light", "b", "c"]
    assert [part.position for part in served.parts["c"] if isinstance(part, Queued)] == [2, 3, 2, 1]


def test_who_is_refused_is_told_when_to_come_again_by_how_long_requests_took(model: Model):
    served = Served(model, request("a", "x" * 20), capacity=1, max_queue=1)
    # A step of a second for each token and the end, and two for the prompt.
    model.during = {
        5: lambda: served.open(request("b"), request("early")),
        22: lambda: served.open(request("c"), request("late")),
    }
    served.run()
    early, late = end(served.parts["early"]), end(served.parts["late"])
    # The one that runs has run for seven seconds, and none has ended: it may take as long again.
    assert (early.error, early.retry_after) == (
        ("overloaded", "1 requests may wait for this model, and they do; try again in 7.0 s"),
        7,
    )
    # The next of this owner's leaves the line when the one that runs ends.
    assert late.retry_after == 21 + 2
    assert late.error
    assert "in 23.0 s" in late.error[1]
    assert all(end(served.parts[id]).retry_after is None for id in "abc")


# Blocks.


@pytest.mark.parametrize(("prompt", "most", "fits"), [(33, 16, True), (33, 17, False), (48, 1, True), (49, 1, False)])
def test_what_can_never_fit_the_cache_is_refused_and_what_fills_it_exactly_runs(
    monkeypatch: pytest.MonkeyPatch, prompt: int, most: int, fits: bool
):
    model = on_its_clock(Model(block_count=3), monkeypatch)
    served = Served(model, request("a", "x" * prompt, max_tokens=most), request("b", max_tokens=9)).run()
    assert served.ends == {"a": ("length", None) if fits else ("error", "context_length_exceeded"), "b": DONE}
    if not fits:
        (refusal,) = served.parts["a"]
        assert isinstance(refusal, Finished)
        assert refusal.error
        assert all(figure in refusal.error[1] for figure in (f"{prompt} tokens", f"the {most} asked", "48 tokens"))


@pytest.mark.parametrize("reuses_blocks", [False, True])
@pytest.mark.parametrize("block_count", [4, 6, 8])
def test_a_cache_too_small_for_all_gives_every_request_its_whole_text_once(
    monkeypatch: pytest.MonkeyPatch, block_count: int, reuses_blocks: bool
):
    model = on_its_clock(Model(block_count, reuses_blocks, max_prefill=24), monkeypatch)
    asked = {id: prompt[: 3 + 5 * int(id) % 26] for id, prompt in words(12, length=40).items()}
    served = Served(model, *requests(asked, max_tokens=30), capacity=5).run()
    assert (set(served.ends.values()), served.texts) == ({DONE}, asked)
    back = [id for id in asked for (_, stop), (start, _) in pairwise(model.steps_of(id)) if start < stop]
    assert len(back) > 1, "some were preempted"
    assert all(Started(len(prompt)) in served.parts[id] for id, prompt in asked.items() if not reuses_blocks)


def test_a_second_turn_is_told_what_it_need_not_compute(monkeypatch: pytest.MonkeyPatch):
    model = on_its_clock(Model(reuses_blocks=True), monkeypatch)
    # The answer is the prompt again, then the end: all of it but the end begins the second turn.
    first, second = "a question of some letters. ", "a question of some letters. " * 2 + "And then?"
    served = Served(model, request("1", first))
    served.then = lambda id: served.open(request("2", second)) if id == "1" else None
    served.run()
    cached = len(first + first) // 16 * 16
    assert Started(len(second), cached) in served.parts["2"]
    assert [end(served.parts[id]).cached_tokens for id in "12"] == [0, cached]
    assert model.steps_of("2")[0] == (cached, len(second))


def test_a_cancelled_answers_blocks_stay_usable(monkeypatch: pytest.MonkeyPatch):
    model = on_its_clock(Model(reuses_blocks=True), monkeypatch)
    served = Served(model, request("1", "x" * 100))
    model.during = {30: lambda: (served.cancel("1"), served.open(request("2", "x" * 120)))}
    served.run()
    assert served.ends == {"1": ("cancelled", None), "2": DONE}
    assert end(served.parts["2"]).cached_tokens == 112


def test_ten_turns_of_a_chat_compute_each_token_about_once(monkeypatch: pytest.MonkeyPatch):
    model = on_its_clock(Model(reuses_blocks=True), monkeypatch)
    history = ["Question 0: " + "why? " * 40]
    served = Served(model, request("0", history[0], max_tokens=57))

    def ask_on(id: str) -> None:
        history.extend([served.texts[id], f"Question {id}: " + "why? " * 40])
        if len(history) < 20:
            served.open(request(str(len(history)), "".join(history), max_tokens=57))

    served.then = ask_on
    served.run()
    length = len("".join(history[:-1]))
    assert (len(served.parts), length) > (9, 2500)
    assert length - 57 <= model.prefilled + 57 * 9 < 1.1 * length


# Cancels.


def test_a_cancel_frees_its_slot_within_one_step(model: Model):
    served = Served(model, *requests(words(6)), capacity=2)
    model.during = {7: lambda: served.cancel("0"), 9: lambda: served.cancel("2")}
    served.run()
    assert [{part for part, _, _ in batch} for batch in model.steps[6:10]] == [
        {"0", "1"},
        {"1", "2"},
        {"1", "2"},
        {"1", "3"},
    ]
    assert (served.steps_at["0"], served.steps_at["2"]) == (7, 9), "acknowledged before the next step"


@pytest.mark.parametrize("step", [1, 2, 9])
def test_all_requests_can_be_cancelled_in_one_step(model: Model, step: int):
    served = Served(model, *requests(words(40, length=30)), capacity=4)
    model.during = {step: lambda: served.cancel(words(40))}
    served.run()
    assert set(served.ends.values()) == {("cancelled", None)}
    assert model.tried == step
    served.open(request("next"))
    served.worker.run()
    assert served.ends["next"] == DONE


def test_a_stop_string_that_comes_in_the_step_of_a_cancel_ends_the_text_once(model: Model):
    served = Served(model, request("a", "say stop here", stop=("stop",)), request("b"))
    model.during = {8: lambda: served.cancel("a")}
    served.run()
    assert (served.ends, served.texts) == ({"a": DONE, "b": DONE}, {"a": "say ", "b": "hello"})
    assert len(model.steps_of("a")) == 8, "its last letter came in this very step"


# Many.


def test_two_hundred_at_once_on_four_slots_are_all_served_in_their_order(model: Model):
    asked = words(200)
    served = Served(model, *requests(asked), capacity=4).run()
    assert (set(served.ends.values()), served.texts) == ({DONE}, asked)
    assert max(len(batch) for batch in model.steps) == 4
    firsts = [part for batch in model.steps for part, start, _ in batch if start == 0]
    assert firsts == list(asked)
    positions = [[part.position for part in parts if isinstance(part, Queued)] for parts in served.parts.values()]
    assert all(told == sorted(set(told), reverse=True) for told in positions)
    assert sum(map(bool, positions)) == 196


def test_a_long_prompts_progress_is_told_five_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch):
    model = on_its_clock(Model(max_prefill=8), monkeypatch)
    served = Served(model, request("a", "x" * 400))
    slow = [part.done for part in served.run().parts["a"] if isinstance(part, Prefill)]
    assert slow == list(range(8, 400, 8)), "a step takes longer than the pause between two"
    quick = on_its_clock(Model(max_prefill=8), monkeypatch)
    monkeypatch.setattr(quick, "monotonic", lambda: 1000 + quick.tried / 16)
    served = Served(on_its_clock(quick, monkeypatch), request("a", "x" * 400)).run()
    told = [part.done for part in served.parts["a"] if isinstance(part, Prefill)]
    assert told == list(range(8, 400, 32))
