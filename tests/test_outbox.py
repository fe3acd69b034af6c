import itertools
import json
from collections import deque
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from wsserver.outbox import Outbox, OutboxFull
from wsserver.protocol import (
    Done,
    Error,
    Goaway,
    Loading,
    Prefill,
    Queued,
    ServerMessage,
    Started,
    Timings,
    Token,
    TokenLogprob,
    Usage,
    encode,
)


def token(id: str, seq: int, text: str = "x", n: int = 1, scored: Iterable[int] | None = None) -> Token:
    """A token frame; `scored` are the tokens that its log probabilities are of, None for a request without."""
    entries = None if scored is None else [TokenLogprob(token_id=i, text=text, logprob=-i / 7) for i in scored]
    return Token(id=id, seq=seq, n=n, text=text, logprobs=entries)


def done(id: str) -> Done:
    usage = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0)
    return Done(id=id, finish_reason="stop", usage=usage, timings=Timings(total_ms=1.0))


def started(id: str) -> Started:
    return Started(id=id, model="a/b", prompt_tokens=1, cached_tokens=0)


def queued(id: str, position: int = 1) -> Queued:
    return Queued(id=id, position=position)


def loading(id: str, progress: float) -> Loading:
    return Loading(id=id, model="a/b", stage="weights", progress=progress)


def error(id: str | None = None) -> Error:
    return Error(code="duplicate_id", message="no", id=id)


def holding(frames: Iterable[ServerMessage]) -> Outbox:
    outbox = Outbox()
    for frame in frames:
        outbox.push(frame)
    return outbox


def drained(outbox: Outbox) -> list[dict[str, Any]]:
    count = len(outbox)
    frames = []
    while (data := outbox.pop()) is not None:
        frames.append(json.loads(data))
    assert len(frames) == count
    assert (outbox.size, len(outbox)) == (0, 0)
    return frames


def as_sent(*frames: ServerMessage) -> list[dict[str, Any]]:
    return [json.loads(encode(frame)) for frame in frames]


def test_an_empty_outbox_has_nothing_to_send() -> None:
    assert Outbox().pop() is None
    assert drained(Outbox()) == []


@pytest.mark.parametrize(
    ("pushed", "sent"),
    [
        # What stays apart.
        ([queued("a"), started("a"), token("a", 0), done("a")],) * 2,
        ([token("a", 0), token("b", 0)],) * 2,
        ([error(), error(), error("a"), error("a")],) * 2,
        ([Goaway(deadline_ms=2), Goaway(deadline_ms=1)],) * 2,
        ([done("a"), done("a")],) * 2,
        ([queued("a"), Prefill(id="a", done=1, total=3)],) * 2,
        # What becomes one.
        ([token("a", 0, "He"), token("a", 1, "l", 3), token("a", 4, "lo")], [token("a", 0, "Hello", 5)]),
        ([queued("a", 3), queued("a", 2), queued("a", 1)], [queued("a", 1)]),
        ([loading("l", 0.1), loading("l", 0.25)], [loading("l", 0.25)]),
        ([Prefill(id="a", done=1, total=3), Prefill(id="a", done=2, total=3)], [Prefill(id="a", done=2, total=3)]),
        # Across other ids, at the place of the first.
        (
            [token("a", 0), token("b", 0), token("a", 1), error(), token("b", 1), token("a", 2)],
            [token("a", 0, "xxx", 3), token("b", 0, "xx", 2), error()],
        ),
        ([queued("a", 2), started("b"), queued("a", 1), done("b")], [queued("a", 1), started("b"), done("b")]),
    ],
)
def test_unread_tokens_and_progress_of_one_id_merge_and_nothing_else(
    pushed: list[ServerMessage], sent: list[ServerMessage]
) -> None:
    assert drained(holding(pushed)) == as_sent(*sent)


def test_what_was_sent_is_not_merged_with() -> None:
    outbox = holding([token("a", 0), token("a", 1)])
    outbox.pop()
    outbox.push(token("a", 2))
    outbox.push(token("a", 3))
    assert drained(outbox) == as_sent(token("a", 2, "xx", 2))


def test_log_probabilities_merge_in_the_order_of_their_tokens() -> None:
    outbox = Outbox()
    for seq in range(0, 9, 3):
        outbox.push(token("a", seq, n=3, scored=range(seq, seq + 3)))
        outbox.push(token("b", seq, n=3))
    [a, b] = drained(outbox)
    assert [entry["token_id"] for entry in a["logprobs"]] == list(range(9))
    assert "logprobs" not in b


@pytest.mark.parametrize("scored", [None, [5]])
def test_merging_leaves_the_frames_that_were_pushed_as_they_were(scored: list[int] | None) -> None:
    pushed = [token("a", seq, scored=scored) for seq in range(3)]
    holding(pushed)
    assert pushed == [token("a", seq, scored=scored) for seq in range(3)]


@pytest.mark.parametrize("between", [[], [started("a")], [queued("a"), started("a")]])
def test_a_new_generation_with_an_old_id_keeps_its_tokens_apart(between: list[ServerMessage]) -> None:
    frames = [token("a", 0, "old"), done("a"), *between, token("a", 0, "new")]
    assert drained(holding(frames)) == as_sent(*frames)


def test_a_new_load_with_an_old_id_keeps_its_progress_apart() -> None:
    frames = [loading("l", 0.5), error("l"), loading("l", 0.1)]
    assert drained(holding(frames)) == as_sent(*frames)


# Dropping.


def test_dropping_forgets_the_unread_tokens_of_that_id_only() -> None:
    outbox = holding([started("a"), token("a", 0), token("b", 0), token("a", 1), token("b", 1)])
    outbox.drop_tokens("a")
    outbox.push(done("a"))
    assert drained(outbox) == as_sent(started("a"), token("b", 0, "xx", 2), done("a"))


@pytest.mark.parametrize("frames", [[], [started("a")], [queued("a")], [token("a", 0), done("a")], [token("b", 0)]])
def test_dropping_where_no_token_waits_changes_nothing(frames: list[ServerMessage]) -> None:
    outbox = holding(frames)
    outbox.drop_tokens("a")
    outbox.drop_tokens("nobody")
    assert drained(outbox) == as_sent(*frames)


def test_an_error_about_a_streaming_id_hides_no_token_from_a_drop() -> None:
    outbox = holding([token("a", 0), error("a"), token("a", 1), error("a")])
    outbox.drop_tokens("a")
    outbox.push(done("a"))
    assert drained(outbox) == as_sent(error("a"), error("a"), done("a"))


def test_the_tokens_of_a_new_generation_are_dropped_without_those_of_the_old_one() -> None:
    outbox = holding([token("a", 0, "old"), done("a"), started("a"), token("a", 0, "new")])
    outbox.drop_tokens("a")
    assert drained(outbox) == as_sent(token("a", 0, "old"), done("a"), started("a"))


def test_a_new_generations_tokens_stay_in_reach_of_a_drop_when_the_old_ones_are_sent() -> None:
    outbox = holding([token("a", 0, "old"), done("a"), token("a", 0, "new")])
    assert outbox.pop() == encode(token("a", 0, "old"))
    outbox.push(token("a", 1, "new"))
    outbox.drop_tokens("a")
    assert drained(outbox) == as_sent(done("a"))


# The bound.


@pytest.mark.parametrize(
    "last",
    [
        queued("c"),
        error(),
        token("c", 0, "y" * 200),
        token("b", 1, "y" * 200),
        token("d", 1, "", scored=[1]),
        loading("l", 0.123456789012345),
    ],
)
def test_what_would_pass_the_bound_is_refused_and_leaves_everything_as_it_was(last: ServerMessage) -> None:
    frames = [loading("l", 0.5), token("b", 0), started("a"), token("d", 0, scored=[0])]
    outbox = holding(frames)
    outbox.max_bytes = size = outbox.size
    with pytest.raises(OutboxFull):
        outbox.push(last)
    assert outbox.size == size
    assert drained(outbox) == as_sent(loading("l", 0.5), token("b", 0), started("a"), token("d", 0, scored=[0]))
    outbox = holding(frames)
    outbox.drop_tokens("b")
    assert outbox.size < size
    outbox.push(token("b", 0))
    assert drained(outbox) == as_sent(loading("l", 0.5), started("a"), token("d", 0, scored=[0]), token("b", 0))


def test_one_done_may_pass_the_bound_and_no_second() -> None:
    outbox = holding([token("a", 0)])
    outbox.max_bytes = outbox.size
    outbox.push(done("a"))
    with pytest.raises(OutboxFull):
        outbox.push(done("b"))
    assert drained(outbox) == as_sent(token("a", 0), done("a"))


def test_any_frame_passes_the_bound_where_nothing_is_unread_and_what_joins_it_is_counted() -> None:
    outbox = Outbox(max_bytes=1000)
    outbox.push(token("a", 0, "x" * 5000))
    outbox.push(token("a", 1, "x" * 800))
    with pytest.raises(OutboxFull):
        outbox.push(token("a", 2, "x" * 800))
    assert drained(outbox) == as_sent(token("a", 0, "x" * 5800, 2))


def test_a_large_frame_that_was_dropped_makes_room_for_the_next() -> None:
    outbox = Outbox(max_bytes=1000)
    outbox.push(token("a", 0, "x" * 5000))
    outbox.drop_tokens("a")
    outbox.push(token("b", 0, "x" * 5000))
    assert drained(outbox) == as_sent(token("b", 0, "x" * 5000))


@pytest.mark.parametrize("unread", [[], [token("a", 0)], [replace(done("a"), text="x" * 5000)]])
def test_it_tells_whether_an_end_has_room(unread: list[ServerMessage]) -> None:
    outbox = Outbox(max_bytes=1000)
    for frame in unread:
        outbox.push(frame)
    large = replace(done("b"), text="x" * 5000)
    if outbox.has_room(large):
        outbox.push(large)
    else:
        with pytest.raises(OutboxFull):
            outbox.push(large)
    assert outbox.has_room(done("c"))


def test_answers_are_counted_while_they_are_unread() -> None:
    outbox = holding([token("a", 0), error(), error("a")])
    assert outbox.answer_bytes == len(encode(error())) + len(encode(error("a")))
    drained(outbox)
    assert outbox.answer_bytes == 0


def test_room_comes_back_with_every_frame_sent() -> None:
    outbox = Outbox(max_bytes=400)
    for seq in range(50):
        outbox.push(token("a", seq, "x" * 200))
        outbox.push(queued("b"))
        assert outbox.size <= 400
        outbox.pop()
        outbox.pop()
        assert outbox.pop() is None
        assert outbox.size == 0


def test_what_was_taken_out_last_takes_room_until_the_next_is_asked_for() -> None:
    outbox = holding([token("a", 0, "x" * 200)])
    outbox.max_bytes = outbox.size + 100
    outbox.pop()
    with pytest.raises(OutboxFull):
        outbox.push(token("a", 1, "x" * 200))
    assert outbox.pop() is None
    outbox.push(token("a", 1, "x" * 200))


def test_a_done_that_is_on_its_way_keeps_nothing_out_however_large_it_is() -> None:
    outbox = Outbox(max_bytes=1000)
    outbox.push(replace(done("a"), text="x" * 5000))
    outbox.pop()
    outbox.push(token("b", 0, "x" * 200))
    assert drained(outbox) == as_sent(token("b", 0, "x" * 200))


@pytest.mark.parametrize("text", ["x", "é", "語", "😀", '"', "\n", "\x00"])
@pytest.mark.parametrize("scored", [None, [3]])
def test_what_is_held_never_encodes_to_more_bytes_than_the_bound(text: str, scored: list[int] | None) -> None:
    outbox, ids = Outbox(max_bytes=5000), itertools.cycle(["a", "😀" * 128])
    filling = (outbox.push(token(next(ids), seq, text, scored=scored)) for seq in itertools.count())
    with pytest.raises(OutboxFull):
        deque(filling, maxlen=0)
    assert sum(len(data) for data in iter(outbox.pop, None)) <= 5000
    assert outbox.size == 0


# Everything at once, against one queue of generations per id.


class Generation:
    """What was said of one generation, and how much of that has been seen at the other end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pushed = 0
        self.seen = 0
        self.told = 0
        self.positions: deque[int] = deque()
        self.stage = "new"
        self.dropped = False


class Traffic(RuleBasedStateMachine):
    """Any legal pushes on three ids, pops and drops; every generation must arrive whole and in order, or be cut cleanly."""

    ids = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox(max_bytes=1500)
        self.generations: dict[str, deque[Generation]] = {id: deque() for id in "abc"}
        self.numbers = 0

    def _current(self, id: str) -> Generation:
        line = self.generations[id]
        if not line or line[-1].stage == "done":
            self.numbers += 1
            line.append(Generation(self.numbers))
        return line[-1]

    def _push(self, frame: ServerMessage) -> bool:
        size, count = self.outbox.size, len(self.outbox)
        try:
            self.outbox.push(frame)
        except OutboxFull:
            assert (self.outbox.size, len(self.outbox)) == (size, count)
            return False
        return True

    @rule(id=ids)
    def queue(self, id: str) -> None:
        generation = self._current(id)
        if generation.stage == "new" and self._push(queued(id, generation.told + 1)):
            generation.told += 1
            generation.positions.append(generation.told)

    @rule(id=ids)
    def start(self, id: str) -> None:
        generation = self._current(id)
        if generation.stage == "new" and self._push(started(id)):
            generation.stage = "started"

    @rule(id=ids, n=st.integers(1, 3))
    def stream(self, id: str, n: int) -> None:
        generation = self._current(id)
        if generation.stage != "started" or generation.dropped:
            return
        numbers = range(generation.pushed, generation.pushed + n)
        text = "".join(f"{generation.number}:{i};" for i in numbers)
        if self._push(token(id, generation.pushed, text, n, scored=numbers if id == "c" else None)):
            generation.pushed += n

    @rule(id=ids)
    def end(self, id: str) -> None:
        generation = self._current(id)
        if self._push(done(id)):
            generation.stage = "done"

    @rule(id=st.sampled_from([*"abc", None]))
    def complain(self, id: str | None) -> None:
        self._push(error(id))

    @rule(id=ids)
    def cancel(self, id: str) -> None:
        generation = self._current(id)
        if generation.stage != "done":
            self.outbox.drop_tokens(id)
            generation.dropped = True

    @rule()
    def pop(self) -> None:
        data = self.outbox.pop()
        if data is None:
            return
        frame = json.loads(data)
        if frame["type"] == "error":
            return
        getattr(self, "_see_" + frame["type"])(self.generations[frame["id"]][0], frame)

    def _see_queued(self, generation: Generation, frame: dict[str, Any]) -> None:
        assert frame["position"] in generation.positions
        while generation.positions.popleft() != frame["position"]:
            pass

    def _see_started(self, generation: Generation, frame: dict[str, Any]) -> None:
        assert not generation.positions
        assert generation.stage in ("started", "done")
        assert generation.seen == 0

    def _see_token(self, generation: Generation, frame: dict[str, Any]) -> None:
        assert not generation.dropped
        assert frame["seq"] == generation.seen
        generation.seen += frame["n"]
        numbers = range(frame["seq"], generation.seen)
        assert frame["text"] == "".join(f"{generation.number}:{i};" for i in numbers)
        if frame["id"] == "c":
            assert [entry["token_id"] for entry in frame["logprobs"]] == [*numbers]

    def _see_done(self, generation: Generation, frame: dict[str, Any]) -> None:
        assert generation.stage == "done"
        assert generation.seen == generation.pushed or generation.dropped
        self.generations[frame["id"]].popleft()

    @invariant()
    def the_size_is_within_the_bound_and_zero_when_empty(self) -> None:
        assert 0 <= self.outbox.size <= 1500
        # One end that was larger than the room there was takes none.
        assert self.outbox.size > 0 or len(self.outbox) <= (self.outbox._large is not None)

    def teardown(self) -> None:
        while len(self.outbox):
            self.pop()
        assert self.outbox.pop() is None
        assert self.outbox.size == 0
        for line in self.generations.values():
            assert len(line) <= 1
            assert all(g.stage != "done" and (g.dropped or g.seen == g.pushed) for g in line)


Traffic.TestCase.settings = settings(
    deadline=None, max_examples=80, stateful_step_count=50, suppress_health_check=[HealthCheck.too_slow]
)
TestTraffic = Traffic.TestCase
