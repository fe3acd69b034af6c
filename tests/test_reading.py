"""Whose bytes are parsed when: speakers that are lists of pieces, each given as the number of frames that end in it."""

import asyncio
from collections import Counter
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import eventually
from wsserver.reading import FRAMES_A_PIECE, FRAMES_PER_TURN, Reading


class Speaker:
    """Somebody of whom pieces were read."""

    def __init__(
        self, name: str, pieces: list[int], parsed: list[str], on_parse: Callable[[int], None] | None = None
    ) -> None:
        self.pieces = pieces
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


async def test_who_says_little_is_heard_at_once_and_before_all_who_go_on_and_on() -> None:
    parsed: list[str] = []
    reading = Reading()
    floods = [Speaker(f"flood {i}", [3] * 20, parsed) for i in range(5)]
    for flood in floods:
        reading.join(flood)
    assert parsed == ["flood 0"] * 3  # so many frames are no others in this turn
    reading.join(one := Speaker("one", [1], parsed))
    await finish(*floods, one)
    # Those who had no turn yet come first, in the order in which they came.
    assert parsed[3:8] == ["flood 1", "flood 2", "flood 3", "flood 4", "one"]
    assert parsed[8:].count("flood 0") == 17


async def test_who_comes_while_others_flood_waits_for_one_turn_at_most() -> None:
    parsed: list[str] = []
    reading = Reading()
    flood = Speaker("flood", [FRAMES_PER_TURN] * 10, parsed)
    reading.join(flood)
    for _ in range(3):
        before = len(parsed)
        reading.join(one := Speaker("one", [1], parsed))
        await finish(one)
        assert "flood" not in parsed[before : parsed.index("one", before)]


async def test_those_who_go_on_take_turns() -> None:
    parsed: list[str] = []
    reading = Reading()
    floods = [Speaker(str(i), [FRAMES_PER_TURN] * 10, parsed) for i in range(4)]
    for flood in floods:
        reading.join(flood)
    await finish(*floods)
    assert parsed == ["0", "1", "2", "3"] * 10


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=20), min_size=1, max_size=12))
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
