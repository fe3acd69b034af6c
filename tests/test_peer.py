"""A client that leaves: its jobs end one after the other, and nobody else waits for that."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from wsserver.job import Job
from wsserver.limits import Owner
from wsserver.peer import Peer
from wsserver.protocol import Generate, ServerMessage, Started
from wsserver.resumables import Resumables
from wsserver.session import ServerState, Session

MANY = 50


class NoLink:
    """Carries nothing."""

    replay_bytes = 1024

    def push(self, frame: ServerMessage) -> None:
        pass

    def has_room(self, frame: ServerMessage) -> bool:
        return True

    def give_up(self, why: str) -> None:
        pass

    def drop_tokens(self, id: str) -> None:
        pass

    async def emptied(self) -> None:
        pass


def client(resumables: Resumables) -> Peer:
    session = Session("s", ServerState(started_at=0.0, max_active=MANY), max_open=MANY, address=Owner("address", "here"))
    return Peer(session, NoLink(), resumables)


def spawn(peer: Peer, serve: Callable[[Job], Awaitable[None]], **fields: bool) -> None:
    """Give a client as many jobs as it may have."""

    async def served(job: Job) -> None:
        await serve(job)

    for number in range(MANY):
        peer.spawn(Generate(id=str(number), prompt="x", **fields), served)


async def test_who_leaves_takes_no_turn_for_all_its_jobs() -> None:
    turns, turn, ended = Counter[int](), 0, []

    async def serve(job: Job) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            turns[turn] += 1
            ended.append(int(job.id))

    peer = client(Resumables())
    spawn(peer, serve)
    await asyncio.sleep(0)
    peer.leave()
    left = asyncio.create_task(peer.left())
    while not left.done():
        turn += 1
        await asyncio.sleep(0)
    assert turns.total() == MANY
    assert max(turns.values()) == 1
    assert ended == sorted(ended, reverse=True), "one that waits in line would take the place of one that ended"


async def test_what_begins_after_its_client_left_is_not_kept_for_it() -> None:
    begin, resumables = asyncio.Event(), Resumables()

    async def serve(job: Job) -> None:
        await begin.wait()
        job.send(Started(id=job.id, model="m", prompt_tokens=1, cached_tokens=0))
        await asyncio.Event().wait()

    peer = client(resumables)
    spawn(peer, serve, resumable=True)
    await asyncio.sleep(0)
    begin.set()
    peer.leave()
    await peer.left()
    assert not len(resumables)
