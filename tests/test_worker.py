"""The engine thread's own rules, with its inbox and posts in the test's hands and a clock that only the model moves.

Nothing here runs on a second thread: the worker serves what is in its inbox until every request has its end.
"""

import queue
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from itertools import pairwise
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.engine import answer as answer_module
from LLM.engine import worker as worker_module
from LLM.engine.inbox import Cancel, Close, Inbox, Open, Parts
from LLM.engine.request import Delta, Finished, GenerationRequest, Part, Prefill, Queued, Sampled, Sampling, Started
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice
from LLM.engine.stream import GenerationStream
from LLM.engine.worker import EngineSettings, Worker
from LLM.model_srv_wsserver_echo import EchoRunner
from tests.test_thread import TOKENIZER, end, request, text

FAILED = ("error", "internal")
DONE = ("stop", None)
KINDS = {Queued: 0, Started: 1, Prefill: 2, Delta: 3, Finished: 4}


class Model:
    """Echoes like the echo model, on a clock of its own: a step takes a second, and a tenth more for every prompt token."""

    memory_bytes = kv_bytes = 0
    block_size = 16

    def __init__(self, block_count: int = 1 << 16, reuses_blocks: bool = False, max_prefill: int = 256) -> None:
        self.block_count, self.reuses_blocks, self.max_prefill = block_count, reuses_blocks, max_prefill
        self.notes: list[str] = ["a note of before"]
        self.steps: list[list[tuple[str, int, int]]] = []  # the slices of each step that did not fail
        self.tried = 0
        self.freed: list[str] = []
        self.unread: set[int] = set()  # the steps launched ahead whose results were not read
        self.clock = 1000.0
        # What a test does in the middle of a step, by its number; what may go wrong with any step, and with its results.
        self.during: dict[int, Callable[[], object]] = {}
        self.fails: Callable[[list[Slice]], Exception | None] = lambda batch: None
        self.spoils: Callable[[Slice, Sampled], Sampled] = lambda part, sampled: sampled

    def monotonic(self) -> float:
        return self.clock

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        self.tried += 1
        if act := self.during.get(self.tried):
            act()
        self.clock += 1 + sum(part.stop - part.start for part in batch if not part.decodes) / 10
        if error := self.fails(batch):
            raise error
        self.steps.append([(name(part), part.start, part.stop) for part in batch])
        results = EchoRunner().step(batch)
        return [sampled and self.spoils(part, sampled) for part, sampled in zip(batch, results, strict=True)]

    def free(self, key: Hashable) -> None:
        self.freed.append(key[1])  # type: ignore[index]

    def steps_of(self, id: str) -> list[tuple[int, int]]:
        return [(start, stop) for batch in self.steps for part, start, stop in batch if part == id]

    @property
    def prefilled(self) -> int:
        """How many tokens went forward in prefills, those computed twice counted twice."""
        return sum(stop - start for batch in self.steps for _, start, stop in batch if stop - start > 1)


def name(part: Slice) -> str:
    return part.sequence.request.key[1]  # type: ignore[index]


class Served:
    """Serves requests until all have ended, and keeps what each was told."""

    def __init__(self, model: Model, *requests: GenerationRequest, capacity: int = 4, max_queue: int = 256) -> None:
        self.parts: dict[str, list[Part]] = {}
        self._heard: dict[GenerationStream, list[Part]] = {}  # the same lists: an id may be opened again
        self.steps_at: dict[str, int] = {}  # how many steps had been tried when each ended
        self.then: Callable[[str], object] = lambda id: None  # what a test does when one has ended
        self._model = model
        self._unfinished = 0
        self._inbox: Inbox = queue.SimpleQueue()
        self.open(*requests)
        settings = EngineSettings(capacity, max_queue=max_queue)
        self.worker = Worker(model, TOKENIZER, settings, self._inbox, self._post)

    def open(self, *requests: GenerationRequest) -> None:
        for one in requests:
            stream = GenerationStream(one, lambda stream: None, lambda stream: None)
            self.parts[one.key[1]] = self._heard[stream] = []  # type: ignore[index]
            self._unfinished += 1
            self._inbox.put(Open(stream))

    def cancel(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._inbox.put(Cancel(("session", id)))

    def close(self) -> None:
        self._inbox.put(Close())

    def run(self) -> "Served":
        self.worker.run()
        for parts in self.parts.values():
            assert_in_order(parts)
        pool = self.worker._scheduler.pool
        assert pool.free == pool.count, "blocks leaked"
        assert not self.worker._answers
        assert sorted(self._model.freed) == sorted(id for id in self.parts if self.ends[id][1] != "context_length_exceeded")
        return self

    @property
    def ends(self) -> dict[str, tuple[str, str | None]]:
        return {id: (end(parts).reason, (end(parts).error or (None,))[0]) for id, parts in self.parts.items()}

    @property
    def texts(self) -> dict[str, str]:
        return {id: text(parts) for id, parts in self.parts.items()}

    def _post(self, parts: Parts) -> None:
        assert parts, "a post of nothing wakes the loop for nothing"
        for stream, part in parts:
            id = stream.request.key[1]  # type: ignore[index]
            self._heard[stream].append(part)
            if isinstance(part, Finished):
                self.steps_at[id] = self._model.tried
                self._unfinished -= 1
                self.then(id)
        if not self._unfinished:
            self.close()


def assert_in_order(parts: list[Part]) -> None:
    """Queued*, Started?, Prefill*, Delta*, Finished; a prefill only grows, and no token is counted twice."""
    kinds = [KINDS[type(part)] for part in parts]
    assert kinds == sorted(kinds)
    assert kinds.count(KINDS[Started]) <= 1
    done = [part.done for part in parts if isinstance(part, Prefill)]
    assert done == sorted(set(done))
    assert sum(part.n for part in parts if isinstance(part, Delta)) <= end(parts).completion_tokens


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return on_its_clock(Model(), monkeypatch)


def on_its_clock(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    clock = SimpleNamespace(monotonic=model.monotonic)
    monkeypatch.setattr(worker_module, "time", clock)
    monkeypatch.setattr(answer_module, "time", clock)
    return model


def words(count: int, length: int = 20) -> dict[str, str]:
    return {str(i): f"{i:03} {'abcdefghijklmnop' * length}"[:length] for i in range(count)}


def requests(texts: dict[str, str], **details: Any) -> list[GenerationRequest]:
    return [request(id, prompt, **details) for id, prompt in texts.items()]


def tokens(batch: list[Slice]) -> int:
    return sum(part.stop - part.start for part in batch)


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
    assert firsts == ["a", "b", "light", "c"]
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
    assert (early.error, early.retry_after) == (
        ("overloaded", "1 requests may wait for this model, and they do; try again in 1.0 s"),
        1,
    )
    assert late.retry_after == 2 * (21 + 2)
    assert late.error
    assert "in 46.0 s" in late.error[1]
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


# One step ahead.


class AheadModel(Model):
    """The same model, launched one ahead. Every launch sees to it that what is in flight can be found on a device."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: list[str] = []
        self.fails_reading: Callable[[int], Exception | None] = lambda number: None
        self._sampled: list[Sequence] = []

    def launch(self, batch: list[Slice]) -> Callable[[], list[Sampled | None]]:
        assert len(self.unread) < 2, "the step before the last one was read"
        for part in batch:
            *known, last = part.sequence.token_ids
            assert IN_FLIGHT not in known
            assert last != IN_FLIGHT or part.sequence in self._sampled
            assert not (part.sequence.needs_its_tokens and last == IN_FLIGHT)
        results, number = self.step(batch), self.tried
        self._sampled = [part.sequence for part in batch if part.samples]
        self.calls.append(f"launch {number}")
        self.unread.add(number)

        def read() -> list[Sampled | None]:
            self.calls.append(f"read {number}")
            self.unread.remove(number)
            if error := self.fails_reading(number):
                raise error
            return results

        return read


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
