"""Whose bytes are parsed next: a few frames of all that was read, then everything else has its turn. Knows no sockets.

One read may give many thousand frames, and many connections may be read at once. Turns are fair between
clients, not between connections: a client with fifty of them gets no more than one with a single one.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

# Frames of all connections together that are parsed in a turn, and for how many a piece counts in which none ends.
FRAMES_PER_TURN = 4
FRAMES_A_PIECE = 1 / 16
REST = 0.004  # seconds between two turns while a client has more: the engine's thread needs the interpreter too
# Between two turns lies this many times what was computed for the first one: reading takes no more than a tenth of the
# interpreter. Otherwise steps took twice as long for more than a second while a hundred long messages were read.
RESTS = 9


class Speaker(Protocol):
    """A connection of which something was read."""

    @property
    def address(self) -> Hashable:
        """Which client's it is."""
        ...

    def parse(self) -> int:
        """Parse a piece of it; give how many frames were in that, a long one for as many as it is long."""
        ...

    def goes_on(self) -> bool:
        """Whether there is more to be parsed now."""
        ...


class RoundRobin:
    """Speakers in the order of their turns: first each client's first one, then each client's second one."""

    def __init__(self) -> None:
        # The client whose turn it is comes first. None is without a speaker.
        self._clients: OrderedDict[Hashable, deque[Speaker]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._clients)

    def append(self, speaker: Speaker) -> None:
        """Add a speaker behind the others of its client."""
        self._clients.setdefault(speaker.address, deque()).append(speaker)

    def pop(self) -> Speaker:
        """Remove and return the next speaker, and pass the turn on to the next client."""
        client, speakers = self._clients.popitem(last=False)
        speaker = speakers.popleft()
        if speakers:
            self._clients[client] = speakers
        return speaker


class Reading:
    """The lines of those who have something to be parsed. Who has said little need not wait for all who go on and on.

    While this thread computes for what was read it is in a context of `giving_way`, which lets an engine's thread in sooner.
    """

    def __init__(self, giving_way: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._giving_way = giving_way
        self._new = RoundRobin()
        self._others = RoundRobin()  # who had a turn, and have more
        # Which line is served before the other one: each in every second turn, so that nobody waits for ever.
        self._lines = [self._new, self._others]
        self._frames_left = float(FRAMES_PER_TURN)
        self._next_turn: asyncio.Handle | None = None
        self._computed = 0.0  # seconds of this thread, in this turn
        self._turn_began = 0.0  # when the first of them did

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Measure the CPU time of this context; the next turn begins the later, the more it is."""
        began = time.thread_time()
        if not self._computed:
            self._turn_began = asyncio.get_running_loop().time()
        try:
            with self._giving_way():
                yield
        finally:
            self._computed += time.thread_time() - began

    def join(self, speaker: Speaker) -> None:
        """Give somebody a turn, now if there is time, and more of them until nothing is left to be parsed."""
        self._new.append(speaker)
        self._parse()

    def _parse(self) -> None:
        try:
            first, second = self._lines
            with self.computing():
                while self._frames_left > 0 and (line := first or second):
                    speaker = line.pop()
                    self._frames_left -= max(speaker.parse(), FRAMES_A_PIECE)
                    if speaker.goes_on():
                        self._others.append(speaker)
        finally:  # whatever one of them raised, the others have their turns
            if self._next_turn is None:
                self._next_turn = self._schedule()

    def _schedule(self) -> asyncio.Handle:
        loop = asyncio.get_running_loop()
        # A loop that never rests keeps the interpreter: whenever it lets go of it for a moment, the engine's thread is
        # woken, and finds it taken again.
        return loop.call_later(REST, self._begin_turn) if self._new or self._others else loop.call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        # Only now is known what it took: messages are handled after the turn in which they were parsed.
        loop = asyncio.get_running_loop()
        due = self._turn_began + (1 + RESTS) * self._computed
        if loop.time() < due:
            self._next_turn = loop.call_at(due, self._begin_turn)
            return
        self._next_turn = None
        self._computed = 0.0
        self._frames_left = float(FRAMES_PER_TURN)
        self._lines.reverse()
        if self._new or self._others:
            self._parse()
