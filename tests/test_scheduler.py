from collections.abc import Hashable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from LLM.engine.request import GenerationRequest
from LLM.engine.scheduler import Scheduler, Sequence, Slice


def request(key: Hashable, prompt: int = 1) -> GenerationRequest:
    return GenerationRequest(key, tuple(range(prompt)), max_tokens=100)


def scheduler(capacity: int = 4, chunk: int = 4, **prompts: int) -> Scheduler:
    made = Scheduler(capacity, chunk)
    for key, prompt in prompts.items():
        assert made.add(request(key, prompt))
    return made


def step(scheduler: Scheduler) -> list[tuple[Hashable, int, int]]:
    """Run one step as the engine does: whatever samples gets a token."""
    batch = scheduler.next_batch()
    for part in batch:
        if part.samples:
            part.sequence.token_ids.append(7)
    return [(part.sequence.request.key, part.start, part.stop) for part in batch]


def steps(scheduler: Scheduler, count: int) -> list[list[tuple[Hashable, int, int]]]:
    return [step(scheduler) for _ in range(count)]


def test_with_nothing_to_do_there_is_no_batch() -> None:
    idle = scheduler()
    assert idle.idle
    assert idle.next_batch() == []
    assert idle.moved() == []


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        (1, [(0, 1)]),
        (3, [(0, 3)]),
        (4, [(0, 4)]),
        (5, [(0, 4), (4, 5)]),
        (12, [(0, 4), (4, 8), (8, 12)]),
    ],
)
def test_a_prompt_goes_forward_in_chunks_then_token_by_token(prompt: int, chunks: list[tuple[int, int]]) -> None:
    alone = scheduler(a=prompt)
    tokens = [(prompt, prompt + 1), (prompt + 1, prompt + 2)]
    assert steps(alone, len(chunks) + 2) == [[("a", *part)] for part in chunks + tokens]


def test_only_the_first_slice_begins_and_only_those_at_the_end_sample() -> None:
    alone, seen = scheduler(a=6), []
    for _ in range(4):
        (part,) = alone.next_batch()
        seen.append((part.begins, part.samples))
        if part.samples:
            part.sequence.token_ids.append(7)
    assert seen == [(True, False), (False, True), (False, True), (False, True)]


def test_a_sequence_tells_its_prompt_from_its_completion() -> None:
    sequence = Sequence(request("a", 3))
    assert (sequence.prefilling, sequence.completion_ids, sequence.completion_tokens) == (True, [], 0)
    sequence.computed = 3
    sequence.token_ids += [8, 9]
    assert (sequence.prefilling, sequence.completion_ids, sequence.completion_tokens) == (False, [8, 9], 2)
    assert sequence.request.prompt_ids == (0, 1, 2)


def test_a_long_prompt_and_running_streams_take_turns() -> None:
    both = scheduler(a=1, b=1)
    steps(both, 3)
    both.add(request("long", 12))
    assert [{key for key, _, _ in batch} for batch in steps(both, 7)] == [
        {"a", "b"},
        {"long"},
        {"a", "b"},
        {"long"},
        {"a", "b"},
        {"long"},
        {"a", "b", "long"},
    ]


def test_every_decoding_sequence_advances_in_one_step() -> None:
    many = scheduler(a=1, b=1, c=1)
    steps(many, 5)
    assert [key for key, _, _ in step(many)] == ["a", "b", "c"]


def test_prompts_are_served_one_after_the_other_in_the_order_in_which_they_came() -> None:
    line = scheduler(a=5, b=9, c=1)
    begun = [key for batch in steps(line, 12) for key, start, _ in batch if start == 0]
    assert begun == ["a", "b", "c"]


def test_no_more_than_the_capacity_run_and_the_next_begins_when_one_goes() -> None:
    full = scheduler(capacity=2, a=1, b=1, c=1)
    steps(full, 6)
    assert (list(full.running), list(full.waiting)) == (["a", "b"], ["c"])
    full.remove("a")
    assert ("c", 0, 1) in [part for batch in steps(full, 2) for part in batch]
    assert (list(full.running), list(full.waiting)) == (["b", "c"], [])


def test_a_full_line_takes_no_one_until_someone_leaves_it() -> None:
    line = Scheduler(capacity=1, max_waiting=2)
    assert line.add(request("a"))
    assert line.add(request("b"))
    assert line.add(request("c")) is None
    assert list(line.waiting) == ["a", "b"]
    line.next_batch()
    assert line.add(request("c"))


def test_positions_are_told_when_they_change_and_only_then() -> None:
    line = scheduler(capacity=1, a=1)
    assert line.moved() == [("a", 1)]
    step(line)
    assert line.moved() == []
    for key in "bcd":
        line.add(request(key))
    assert line.moved() == [("b", 1), ("c", 2), ("d", 3)]
    step(line)
    assert line.moved() == []
    line.remove("c")
    assert line.moved() == [("d", 2)]
    line.remove("a")
    step(line)
    assert line.moved() == [("d", 1)]


@pytest.mark.parametrize(
    "steps_before", [0, 1, 2, 3, 6], ids=["waiting", "in prefill", "in prefill too", "decoding", "later"]
)
def test_a_removed_request_is_gone_in_every_state_and_the_others_go_on(steps_before: int) -> None:
    line = scheduler(capacity=2, a=9, b=1)
    steps(line, steps_before)
    removed = line.remove("a")
    assert removed is not None
    assert removed.request.key == "a"
    assert line.remove("a") is None
    assert {key for batch in steps(line, 3) for key, _, _ in batch} == {"b"}
    line.remove("b")
    assert line.idle


def test_a_request_that_is_removed_while_it_waits_is_never_computed() -> None:
    line = scheduler(capacity=1, a=1, b=1)
    step(line)
    removed = line.remove("b")
    assert removed is not None
    assert removed.computed == 0
    assert all(key == "a" for batch in steps(line, 4) for key, _, _ in batch)


def test_an_unknown_key_cannot_be_removed() -> None:
    assert scheduler(a=1).remove("b") is None


class Service(RuleBasedStateMachine):
    """Requests of any length come, are stopped at any time, or are served to their end."""

    CAPACITY, CHUNK, LINE = 3, 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(self.CAPACITY, self.CHUNK, self.LINE)
        self.lengths: dict[int, int] = {}  # how many tokens each open request is to get
        self.computed: dict[int, int] = {}
        self.ready_since: dict[int, int] = {}  # steps since each open request last went forward
        self.told: dict[int, int] = {}
        self.begun: list[int] = []
        self.added = self.gone = 0

    @rule(prompt=st.integers(1, 14), tokens=st.integers(1, 5))
    def add(self, prompt: int, tokens: int) -> None:
        waiting = len(self.scheduler.waiting)
        sequence = self.scheduler.add(request(self.added, prompt))
        assert (sequence is None) == (waiting == self.LINE)
        if sequence:
            self.lengths[self.added], self.computed[self.added] = prompt + tokens, 0
            self.added += 1

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.integers(0, max(0, self.added)))
        removed = self.scheduler.remove(key)
        assert (removed is not None) == (key in self.lengths)
        if removed:
            assert removed.computed == self.computed[key]
            self._forget(key)

    @rule()
    def step(self) -> None:
        batch = self.scheduler.next_batch()
        assert bool(batch) == bool(self.lengths)
        for key in self.ready_since:
            self.ready_since[key] += 1
        for part in batch:
            self._advance(part)
        assert all(idle <= 1 for idle in self.ready_since.values()), "a running sequence was left out twice in a row"

    def _advance(self, part: Slice) -> None:
        key, sequence = part.sequence.request.key, part.sequence
        assert isinstance(key, int)
        assert part.start == self.computed[key] < part.stop <= len(sequence.token_ids)
        assert part.stop - part.start <= self.CHUNK
        self.computed[key] = part.stop
        if part.begins:
            assert not self.begun or key > self.begun[-1]
            self.begun.append(key)
        if part.samples:
            sequence.token_ids.append(7)
        # One prompt goes forward at a time; a running one has had its first slice.
        self.ready_since[key] = 0
        if len(sequence.token_ids) == self.lengths[key]:
            assert self.scheduler.remove(key) is sequence
            self._forget(key)

    @rule()
    def move(self) -> None:
        positions = {key: place for place, key in enumerate(self.scheduler.waiting, 1)}
        moved = self.scheduler.moved()
        assert moved == [(key, place) for key, place in positions.items() if self.told.get(key) != place]
        self.told.update(moved)

    def _forget(self, key: int) -> None:
        del self.lengths[key], self.computed[key]
        self.ready_since.pop(key, None)
        self.gone += 1

    @invariant()
    def every_request_added_is_waiting_or_running_or_gone(self) -> None:
        waiting, running = list(self.scheduler.waiting), list(self.scheduler.running)
        assert waiting == sorted(waiting)
        assert sorted(waiting + running) == list(self.lengths)
        assert self.added == self.gone + len(waiting) + len(running)
        assert len(running) <= self.CAPACITY
        assert self.scheduler.idle == (not self.lengths)

    def teardown(self) -> None:
        for _ in range(200):
            self.step()
        assert self.scheduler.idle
        assert self.begun == sorted(set(self.begun))


Service.TestCase.settings = settings(
    deadline=None, max_examples=50, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
TestService = Service.TestCase
