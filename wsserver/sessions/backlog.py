"""What one client is sent late: whole answers for which there was no room, and the past of answers it resumes.

One frame at a time, each once everything before it is on its way. Knows no sockets and no models.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from wsserver.job import Job
from wsserver.limits import REPLAYED_BYTES
from wsserver.outbox import weight
from wsserver.protocol import ServerMessage
from wsserver.session import Session

# Outboxes' worth of whole answers that may wait beside as many of them as can end at once.
OUTBOXES = 64
TOO_MUCH = "too many whole answers are unread"


class Link(Protocol):
    """What carries the frames, as far as a backlog needs it."""

    async def emptied(self) -> None:
        """Wait until everything that was pushed is on its way."""
        ...

    def give_up(self, why: str) -> None:
        """Close because the client reads too slowly."""
        ...


class Backlog:
    """The late frames of one client."""

    def __init__(self, session: Session, link: Link) -> None:
        self._session = session
        self._link = link
        self._one_at_a_time = asyncio.Lock()
        self._ends: set[Job] = set()  # whose end waits here

    @asynccontextmanager
    async def turn(self, job: Job, paced: bool) -> AsyncIterator[None]:
        """Wait until the next late frame may be pushed, which is to be done in the context.

        `paced` is for the past, of which a client may ask for any amount again and again.
        """
        if paced:
            await self._allowed()
            async with self._one_at_a_time:
                await self._link.emptied()
                yield
            return
        with self._holding(job):
            async with self._one_at_a_time:
                await self._link.emptied()
                yield

    def charge(self, frame: ServerMessage) -> None:
        """Count a frame of the past that was sent."""
        self._session.account.replays.spend(weight(frame) / REPLAYED_BYTES, time.monotonic())

    async def _allowed(self) -> None:
        # A client on a bad network comes back often: it waits, and is never refused.
        while seconds := self._session.account.replays.wait(time.monotonic()):
            await _pass(seconds)

    @contextmanager
    def _holding(self, job: Job) -> Iterator[None]:
        # What is unread counts as running, so that a client that does not read cannot ask for more and more.
        account = self._session.account
        account.requests += 1
        self._ends.add(job)
        try:
            if self._holds_too_much:
                self._link.give_up(TOO_MUCH)
            yield
        finally:
            account.requests -= 1
            self._ends.discard(job)

    @property
    def _holds_too_much(self) -> bool:
        server = self._session.server
        most = OUTBOXES * server.config.max_outbox_bytes
        return len(self._ends) > server.max_active and sum(job.size for job in self._ends) > most


async def _pass(seconds: float) -> None:
    """Wait until so many seconds have passed by."""
    passed = asyncio.Event()  # no future, which a cancel in the very turn in which the time is over would have ended
    timer = asyncio.get_running_loop().call_later(seconds, passed.set)
    try:
        await passed.wait()
    finally:
        timer.cancel()
