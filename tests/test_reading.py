"""Whose bytes are parsed when: speakers that are lists of pieces, each given as the number of frames that end in it."""

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.giving_way import SWITCH_INTERVAL, USUAL
from tests.conftest import eventually, running
from wsserver.reading import FRAMES_A_PIECE, FRAMES_PER_TURN, RESTS, Reading
from wsserver.session import Session

WORK = 0.01  # seconds


class Speaker:
    """Somebody of whom pieces were read."""

    def __init__(
        self,
        name: str,
        pieces: list[int],
        parsed: list[str],
        on_parse: Callable[[int], None] | None = None,
        address: Hashable = None,
    ) -> None:
        self.pieces = pieces
        self.address = address or self
        self._name = name
        self._parsed = parsed
        self._on_parse = on_parse

    def parse(self) -> int:
        self._parsed.append(self._name)
        frames = self.pieces.pop(0)
        if self._on_parse:
            self._on_parse(frames)
        return frames

    def goes_on(self) -> bool:
        return bool(self.pieces)


async def finish(*speakers: Speaker) -> None:
    await eventually(lambda: not any(speaker.pieces for speaker in speakers))


async def test_who_says_little_is_heard_at_once_or_in_the_turn_after_the_next() -> None:
    parsed: list[str] = []
    reading = Reading()
    reading.join(Speaker("one", [1], parsed))
    assert parsed == ["one"]
    floods = [Speaker(f"flood {i}", [FRAMES_PER_TURN] * 20, parsed) for i in range(5)]
    for flood in floods:
        reading.join(flood)
    assert parsed[1:] == ["flood 0"]  # so many frames are no others in this turn
    for flood in floods[1:]:
        assert len(flood.pieces) == 20
    reading.join(other := Speaker("other", [1], parsed))
    await finish(*floods, other)
    # In every second turn those go first who had one: four floods came before this one, and each takes a turn.
    assert parsed.index("other") == 2 + 4 * 2 + 1


async def test_those_who_go_on_are_not_kept_waiting_by_ever_new_ones() -> None:
    parsed: list[str] = []
    reading = Reading()
    reading.join(long := Speaker("long", [FRAMES_PER_TURN] * 10, parsed))
    others: list[Speaker] = []
    while long.pieces:
        for _ in range(3):
            others.append(Speaker("new", [FRAMES_PER_TURN], parsed))
            reading.join(others[-1])
        before = len(parsed)
        await eventually(lambda: len(parsed) > before)  # noqa: B023 - it has ended before that changes
    assert parsed.count("new") <= 20
    await finish(*others)


async def test_new_ones_are_not_kept_waiting_by_those_who_go_on() -> None:
    parsed: list[str] = []
    reading = Reading()
    floods = [Speaker("flood", [FRAMES_PER_TURN] * 30, parsed) for _ in range(3)]
    for flood in floods:
        reading.join(flood)
    await eventually(lambda: len(parsed) > 10)  # each has had a turn
    before = len(parsed)
    reading.join(one := Speaker("one", [1], parsed))
    await finish(one)
    assert parsed.index("one", before) - before <= 2
    await finish(*floods)


async def test_those_who_go_on_take_turns() -> None:
    parsed: list[str] = []
    reading = Reading()
    floods = [Speaker(str(i), [FRAMES_PER_TURN] * 10, parsed) for i in range(4)]
    for flood in floods:
        reading.join(flood)
    await finish(*floods)
    assert Counter(parsed) == dict.fromkeys("0123", 10)
    for end in range(len(parsed) - 4):
        counts = Counter("0123") + Counter(parsed[:end])
        assert max(counts.values()) - min(counts.values()) <= 4


async def test_turns_are_fair_between_clients_not_connections() -> None:
    parsed: list[str] = []
    reading = Reading()
    reading.join(first := Speaker("first", [FRAMES_PER_TURN], parsed))  # so that the others wait
    many = [Speaker("one of many", [1], parsed, address="many") for _ in range(50)]
    for one in many:
        reading.join(one)
    reading.join(alone := Speaker("alone", [1], parsed, address="alone"))
    await finish(first, *many, alone)
    assert parsed.index("alone") <= 2


@settings(deadline=None, max_examples=50)  # it rests between two turns
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=1, max_size=8))
def test_everything_is_parsed_and_no_turn_is_long(said: list[list[int]]) -> None:
    parsed: list[str] = []
    turn, cost = [0], Counter[int]()

    async def read() -> None:
        def pass_on() -> None:
            turn[0] += 1
            passing[0] = loop.call_soon(pass_on)

        def count(frames: int) -> None:
            cost[turn[0]] += max(frames, FRAMES_A_PIECE)  # type: ignore[assignment]

        loop = asyncio.get_running_loop()
        passing = [loop.call_soon(pass_on)]
        reading = Reading()
        speakers = [Speaker(str(i), list(pieces), parsed, count) for i, pieces in enumerate(said)]
        for speaker in speakers:
            reading.join(speaker)
        await finish(*speakers)
        passing[0].cancel()

    asyncio.run(read())
    assert Counter(parsed) == {str(i): len(pieces) for i, pieces in enumerate(said)}
    # The piece with which it is enough may have more frames than were left.
    assert max(cost.values()) <= FRAMES_PER_TURN + max(map(max, said))


async def test_the_loop_rests_while_somebody_floods() -> None:
    loop = asyncio.get_running_loop()
    parsed: list[str] = []
    reading = Reading()
    reading.join(flood := Speaker("flood", [FRAMES_PER_TURN] * 3, parsed))
    # Nothing is ready to run now: with a clock that stands still it waits.
    stands, loop_time = loop.time(), loop.time
    loop.time = lambda: stands  # type: ignore[method-assign]
    try:
        for _ in range(100):
            await asyncio.sleep(0)
        assert parsed == ["flood"]
    finally:
        loop.time = loop_time  # type: ignore[method-assign]
    await finish(flood)


async def test_it_rests_in_proportion_to_what_was_computed_for_what_was_read() -> None:
    loop = asyncio.get_running_loop()
    parsed: list[str] = []
    reading = Reading()

    def compute(frames: int) -> None:
        busy(WORK)

    def busy(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    began = loop.time()
    reading.join(flood := Speaker("flood", [FRAMES_PER_TURN] * 2, parsed, compute))
    await asyncio.sleep(0)
    with reading.computing():  # its messages are handled after they were parsed
        busy(WORK)
    await eventually(lambda: len(parsed) == 2)
    assert loop.time() - began >= (1 + RESTS) * 2 * WORK
    reading.join(other := Speaker("other", [1], parsed))
    assert parsed == ["flood", "flood"]
    await finish(flood, other)


async def test_it_gives_way_while_it_computes_and_no_longer() -> None:
    inside: list[bool] = []
    within = False

    @contextlib.contextmanager
    def giving_way() -> Iterator[None]:
        nonlocal within
        within = True
        yield
        within = False

    reading = Reading(giving_way)
    reading.join(one := Speaker("one", [1], [], lambda _: inside.append(within)))
    with reading.computing():
        inside.append(within)
    await finish(one)
    assert (inside, within) == ([True, True], False)


async def test_a_server_gives_way_while_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals: list[float] = []
    heard = Session.heard

    def hear(session: Session, text: str, now: float) -> None:
        intervals.append(sys.getswitchinterval())
        heard(session, text, now)

    monkeypatch.setattr(Session, "heard", hear)
    async with running() as server, server.client() as client:
        await client.settle()
    assert intervals == [pytest.approx(SWITCH_INTERVAL)]
    assert sys.getswitchinterval() == USUAL


async def test_one_that_cannot_be_parsed_keeps_nobody_else_waiting() -> None:
    def fail(_: int) -> None:
        raise ValueError("the test says so")

    parsed: list[str] = []
    reading = Reading()
    reading.join(Speaker("flood", [FRAMES_PER_TURN], parsed))
    reading.join(Speaker("bad", [1], parsed, fail))
    reading.join(one := Speaker("one", [1], parsed))
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    await finish(one)
    assert parsed == ["flood", "bad", "one"]
    assert [str(error) for error in told] == ["the test says so"]
