"""What is forgotten first of all that may be resumed, and how fast the past is told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from tests.conftest import Running, eventually
from tests.scripted import WIDE, ScriptedModel, scripted
from wsserver.job import Job
from wsserver.limits import Owner, TokenBucket
from wsserver.resumables import Resumables
from wsserver.sessions import backlog


class Kept:
    """Stands for a job."""

    def __init__(self, owner: str, size: int) -> None:
        self.owner, self.size, self.id = Owner("key", owner), size, "g"
        self.ended = self.needs_transcript = self.forgotten = False
        self.listener: object | None = self

    def forget(self) -> None:
        self.forgotten = True


def keep(resumables: Resumables, owner: str, size: int = 10) -> Kept:
    job = Kept(owner, size)
    resumables.keep(cast(Job, job))
    return job


async def test_the_client_that_has_most_loses_what_it_misses_least() -> None:
    resumables = Resumables(max_bytes=100)
    quiet = [keep(resumables, name) for name in "abc"]
    loud = [keep(resumables, "loud") for _ in range(7)]
    loud[3].listener = None
    resumables.let_go(cast(Job, loud[3]))
    loud[5].ended = True
    resumables.let_go(cast(Job, loud[5]))
    loud += [keep(resumables, "loud") for _ in range(3)]
    assert [number for number, job in enumerate(loud) if job.forgotten] == [0, 3, 5]
    assert not any(job.forgotten for job in quiet)
    assert resumables.size == 100


async def test_one_that_pushes_in_cannot_push_out_others() -> None:
    resumables = Resumables(max_bytes=1000)
    quiet = [keep(resumables, str(number)) for number in range(50)]
    for job in quiet:
        job.ended = True
        resumables.let_go(cast(Job, job))
    for _ in range(500):
        keep(resumables, "loud")
    assert not any(job.forgotten for job in quiet)
    assert resumables.size <= 1000


async def test_what_is_being_read_stays_and_goes_once_it_was_read() -> None:
    resumables = Resumables(max_bytes=100)
    read = keep(resumables, "a", 60)
    read.needs_transcript = True
    resumables.moved(cast(Job, read))
    other = keep(resumables, "a", 60)
    assert (read.forgotten, other.forgotten) == (False, True)
    resumables.grew(cast(Job, read), 50)
    assert not read.forgotten
    read.needs_transcript = False
    resumables.moved(cast(Job, read))
    assert read.forgotten
    assert resumables.size == 0


@pytest.fixture
async def stage() -> AsyncIterator[tuple[Running, ScriptedModel]]:
    async with scripted() as stage:
        yield stage


async def test_the_past_is_told_at_the_rate_of_its_client_who_is_not_refused_and_may_go_on_asking(
    stage: tuple[Running, ScriptedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model = stage
    waits: list[float] = []
    passed = asyncio.Event()

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        await passed.wait()
        (account,) = [a for a in server.server.state.accounts._accounts.values() if a.replays is slow]
        account.replays = TokenBucket(1e9, 1e9)

    slow = TokenBucket(1.0, 1.0)
    monkeypatch.setattr(backlog, "_pass", wait)
    async with server.client() as client, server.client() as other:
        await client.send(type="generate", id="g", prompt=WIDE * 50, resumable=True)
        model.open()
        await client.done("g")
        for account in server.server.state.accounts._accounts.values():
            account.replays = slow
        await other.resume(client, "g", after_seq=0)
        await eventually(lambda: bool(waits))
        assert len(other.frames) == 0
        await other.settle()
        assert [frame["type"] for frame in other.frames[:2]] == ["resumed", "token"]
        assert waits[0] > 10  # a frame of 64 KiB counts for 16, and one comes back each second
        passed.set()
        await other.done("g")
        assert other.checker.texts["g"] == WIDE * 50


async def test_a_usual_reconnect_waits_for_nothing(
    stage: tuple[Running, ScriptedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait(seconds: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr(backlog, "_pass", wait)
    server, model = stage
    model.open()
    fields: dict[str, Any] = {"id": "g", "prompt": "word " * 500, "logprobs": 5, "resumable": True}
    async with server.client() as client:
        await client.send(type="generate", **fields)
        await client.done("g")
        for _ in range(5):
            async with server.client() as other:
                await other.resume(client, "g", after_seq=0)
                assert (await other.done("g"))["finish_reason"] == "stop"
