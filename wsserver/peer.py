"""One client, whatever it speaks through: its session and the jobs that serve its ids. What message handlers talk to.

Knows no sockets: frames go to a link, which carries them, and may be slow.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Protocol

from wsserver.job import Job
from wsserver.protocol import (
    ClientMessage,
    Detached,
    Done,
    Generate,
    Init,
    Refusal,
    Resume,
    Resumed,
    ServerMessage,
    Token,
    decode,
)
from wsserver.resumables import Resumables
from wsserver.session import Session, StopReason, WrongKey
from wsserver.sessions.backlog import Backlog

# What handles one client message: it decides and spawns, and never waits.
Dispatch = Callable[[ClientMessage, "Peer"], None]
# What gives the name of a key's owner, None if the key is wrong.
Whose = Callable[[str], str | None]

NEVER_THERE = "$.after_seq: no token frame ended there; give the seq + n of the last one received, 0 if there was none"


class Link(Protocol):
    """What carries frames to a client."""

    # The bytes of the past that it should be given at once, before it is waited for.
    replay_bytes: int

    def push(self, frame: ServerMessage) -> None:
        """Take a frame, to be sent in its turn."""
        ...

    def has_room(self, frame: ServerMessage) -> bool:
        """Whether a frame may be pushed now; one that may not waits for `emptied`."""
        ...

    def drop_tokens(self, id: str) -> None:
        """Forget the tokens of an id that are not sent yet."""
        ...

    def give_up(self, why: str) -> None:
        """Close because the client reads too slowly."""
        ...

    async def emptied(self) -> None:
        """Wait until everything that was pushed is on its way."""
        ...


class Peer:
    """One client. What was said about an id goes through the session, which knows what may be said next."""

    def __init__(self, session: Session, link: Link, resumables: Resumables) -> None:
        self.session = session
        self._link = link
        self._resumables = resumables
        self._asked = 0
        self._jobs: dict[str, Job] = {}  # by the ids that are open here
        self._replays: dict[str, asyncio.Task[None]] = {}
        self._backlog = Backlog(session, link)
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._ending: list[asyncio.Task[None]] = []

    # For message handlers.

    def reply(self, frame: ServerMessage) -> None:
        """Say something that is about no open id."""
        self._link.push(frame)

    def spawn(self, message: Init | Generate, serve: Callable[[Job], Coroutine[None, None, None]]) -> None:
        """Open a message's id and serve it by a job.

        Raises:
            Refusal: the session does not let the message in.
        """
        id = self.session.open(message)
        self._asked += 1
        job = Job(id, self._asked, message, self, self._resumables, self.session.account, self.session.owner)
        self._take(job)
        job.start(serve)

    def resume(self, message: Resume) -> None:
        """Take up a job where its client left it, from another connection if that still has it.

        Raises:
            Refusal: there is no such job, it never was at that place, or the session does not let the message in.
        """
        job = self._resumables.find(message, self.session.key)
        if not job.reaches(message.after_seq):
            raise Refusal("bad_message", NEVER_THERE, message.id)
        self.session.open(message)
        before = job.listener
        self._take(job)
        self._replay(job, message.after_seq, paced=True)  # never without a listener, or it might be forgotten just then
        if before:
            before.lose(job)
        self.send(Resumed(id=job.id, seq=message.after_seq))

    def stop(self, ids: list[str], reason: StopReason, now: float) -> None:
        """Stop the jobs of ids that the session has just marked as stopping, at `now` seconds."""
        for id in ids:
            # What was made before a shutdown is not dropped: nobody asked to forget it.
            if reason == "cancelled":
                self._link.drop_tokens(id)
            self._jobs[id].stop(reason, now)

    # For jobs.

    def send(self, frame: ServerMessage) -> None:
        """Say something about an open id, if the session still lets it out; an end for which there is no room waits."""
        if isinstance(frame, Done) and frame.id not in self._replays and not self._link.has_room(frame):
            job = self._jobs[frame.id]
            self._replay(job, job.tokens, paced=False)
            return
        admitted = self.session.admit(frame, time.monotonic())
        id: str = getattr(frame, "id", "")
        if not self.session.has(id):
            if self._jobs[id].listener is self:
                self._jobs[id].listen(None)
            self._drop(id)
        if admitted is not None:
            self._link.push(admitted)

    def lose(self, job: Job) -> None:
        """Hear of a job no more: it was taken up elsewhere."""
        if replay := self._replays.get(job.id):
            replay.cancel()
        self.send(Detached(id=job.id))

    # For whoever holds the link.

    def hear(self, text: str, dispatch: Dispatch, whose: Whose) -> None:
        """Take one message of the client's; one that is refused is answered.

        Raises:
            WrongKey: it has shown a wrong key, and was told so.
            TooManyBadMessages: it sends nothing but nonsense, and is not answered any more.
            TooManyMessages: it does not slow down though it was told to.
        """
        session, now = self.session, time.monotonic()
        try:
            session.heard(text, now)
            message = decode(text, session.server.config.max_json_depth)
            session.authenticate(message, whose)
            session.understood(message, now)
            dispatch(message, self)
        except Refusal as refusal:
            self._link.push(session.answer(refusal))
            if isinstance(refusal, WrongKey):
                raise

    def stop_all(self, reason: StopReason) -> None:
        """Stop everything that still runs."""
        now = time.monotonic()
        # What has ended and waits to be read is told as it ended.
        running = [id for id in self.session.active if not self._jobs[id].ended]
        self.stop(self.session.stop(running, reason, now), reason, now)

    def leave(self) -> None:
        """Hear and say nothing any more: jobs that are kept go on without a listener, all others end."""
        ending = [job.task for job in self._jobs.values() if not job.kept] + list(self._replays.values())
        for id, job in list(self._jobs.items()):
            job.listen(None)
            self._drop(id)
        self.session.forget()
        if ending:
            self._ending += [*ending, asyncio.create_task(_cancel(ending))]

    async def left(self) -> None:
        """Wait until everything has ended that `leave` ends."""
        if self._ending:
            await asyncio.wait(self._ending)
        self._ending.clear()

    async def idle(self) -> None:
        """Wait until no id is open."""
        await self._none_open.wait()

    def _take(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._none_open.clear()

    def _drop(self, id: str) -> None:
        del self._jobs[id]
        self._replays.pop(id, None)
        if not self._jobs:
            self._none_open.set()

    def _replay(self, job: Job, seq: int, paced: bool) -> None:
        """Begin to send what a job said since `seq`, or its end that is still to be sent."""
        job.listen(self, live=False)
        self._replays[job.id] = asyncio.create_task(self._send_past(job, seq, paced))

    async def _send_past(self, job: Job, seq: int, paced: bool) -> None:
        """Send what was said since `seq`, as fast as the link takes it; then let the job speak for itself."""
        while self._jobs.get(job.id) is job:  # until its end was sent; or the link is gone, which may be too full
            async with self._backlog.turn(job, paced):
                if self._jobs.get(job.id) is not job:
                    return
                frame = job.after(seq, self._link.replay_bytes)
                if frame is None:
                    # Nothing awaits from that look to here, so nothing is said in between.
                    del self._replays[job.id]
                    job.listen(self)
                    return
                self.send(frame)
            if paced:
                self._backlog.charge(frame)
            if isinstance(frame, Token):
                seq += frame.n


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel one task a turn: all of a client's at once would take a turn in which nobody else's token is sent.

    The newest first, so that none that waits in line takes the place of one that has just ended.
    """
    for task in reversed(tasks):
        task.cancel()
        await asyncio.sleep(0)
