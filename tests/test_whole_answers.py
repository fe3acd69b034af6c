"""Whole answers larger than an outbox that end together: each arrives whole at a client that reads."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import Client, Running, eventually
from tests.scripted import WIDE, ScriptedModel, closing_code, scripted
from wsserver.protocol import Done

WIDES = 600  # of 4 KiB: more than an outbox, and all of them more than the kernel buffers
ASKED = {"prompt": WIDE * 50, "ignore_eos": True, "max_tokens": WIDES + WIDES // 50, "stream": False}
TEXT = WIDE * WIDES


@pytest.fixture
async def stage() -> AsyncIterator[tuple[Running, ScriptedModel]]:
    async with scripted(messages_per_second=1000.0, max_active=8) as stage:  # all end in the same step
        yield stage


async def ask(client: Client, model: ScriptedModel, count: int, **fields: Any) -> list[str]:
    """Ask for so many whole answers, which end in the same step."""
    ids = [f"g{number}" for number in range(count)]
    for id in ids:
        await client.send(type="generate", id=id, **ASKED, **fields)
    await client.settle()
    await eventually(lambda: model.step_gate.let(0) or bool(model.steps))
    return ids


def waiting(server: Running) -> int:
    """Give how many ends wait for room."""
    return len(connection_of(server).peer._backlog._ends)


def connection_of(server: Running) -> Any:
    (connection,) = server.server._connections
    return connection


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("fields", [{}, {"resumable": True}], ids=["plain", "resumable"])
async def test_all_arrive_whole_at_a_client_that_reads(
    stage: tuple[Running, ScriptedModel], count: int, fields: dict[str, bool]
) -> None:
    server, model = stage
    async with server.client(max_size=None) as client:
        ids = await ask(client, model, count, **fields)
        model.open()
        for id in ids:
            done = await client.done(id)
            assert (done["finish_reason"], done["text"]) == ("length", TEXT)
        assert (await client.settle())["connection"]["active"] == []
        client.checker.quiet()


async def stuck(server: Running, client: Client, model: ScriptedModel) -> list[str]:
    """Let whole answers end for a client that reads nothing, so that all wait but those that the system's buffers take.

    Give their ids, in the order in which they will be let out.
    """
    ids = await ask(client, model, 8)
    client.socket.transport.pause_reading()
    model.open()
    peer = connection_of(server).peer
    await eventually(lambda: waiting(server) > 1 and all(job.ended for job in peer._jobs.values()))
    last = list(peer._replays)
    return [id for id in ids if id not in last] + last


async def heard(server: Running, client: Client) -> None:
    """Wait until the server has read what was sent to it, by an answer that stays in the outbox."""
    await client.send(type="status")
    await eventually(lambda: connection_of(server)._outbox.answer_bytes > 0)


async def test_a_client_that_reads_nothing_is_closed_and_no_more_than_one_of_them_lies_in_its_outbox(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.connection.CLOSE_TIMEOUT", 0.0)
    async with scripted(stall_timeout=1.0, max_active=8) as (server, model), server.client(max_size=None) as client:
        await stuck(server, client, model)
        connection = connection_of(server)
        ends = [frame for frame in connection._outbox._frames.values() if isinstance(frame, Done)]
        assert len(ends) <= 1  # the writer may have taken it
        account = connection.peer.session.account
        assert account.requests >= waiting(server) > 1
        await eventually(lambda: "nothing was read for too long" in caplog.text)
        await eventually(lambda: not server.server._connections)
        assert account.requests == 0


async def test_its_id_is_open_until_it_was_let_out_so_that_it_is_not_taken_twice(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client(max_size=None) as client:
        ids = await stuck(server, client, model)
        await client.send(type="generate", id=ids[-1], prompt="again")
        await heard(server, client)
        client.socket.transport.resume_reading()
        assert (await client.until("error"))["code"] == "duplicate_id"
        for id in ids:
            assert (await client.done(id))["text"] == TEXT


async def test_a_cancel_while_it_waits_is_answered_by_its_end_and_the_others_stay_whole(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client(max_size=None) as client:
        ids = await stuck(server, client, model)
        await client.send(type="cancel", id=ids[-1])
        await heard(server, client)
        client.socket.transport.resume_reading()
        assert [(await client.done(id))["finish_reason"] for id in ids] == ["length"] * 7 + ["cancelled"]
        assert [(await client.done(id))["text"] == TEXT for id in ids[:7]] == [True] * 7
        client.checker.quiet()


async def test_a_disconnect_while_they_wait_leaves_nothing_behind(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client(max_size=None) as client:
        await stuck(server, client, model)
        account = connection_of(server).peer.session.account
        client.socket.transport.abort()
        await eventually(lambda: not server.server._connections)
        assert account.requests == 0
        assert not model.held()


async def test_a_drain_waits_for_them_and_tells_them_as_they_ended(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client(max_size=None) as client:
        ids = await stuck(server, client, model)
        peer = connection_of(server).peer
        peer.stop_all("shutdown")
        drain = asyncio.create_task(server.server.drain())
        client.socket.transport.resume_reading()
        for id in ids:
            done = await client.done(id)
            assert (done["finish_reason"], done["text"]) == ("length", TEXT)
        assert await closing_code(client) == 1012
        await drain


async def test_with_once_the_first_one_comes_whole_before_the_close() -> None:
    async with scripted() as (server, model):
        server.url += "?once=1"
        async with server.client(max_size=None) as client:
            await ask(client, model, 4)
            model.open()
            assert (await client.until("done"))["text"] == TEXT
            assert await closing_code(client) == 1000


async def test_an_end_that_waited_waits_on_if_another_went_out_before_it_woke(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, _ = stage
    async with server.client():
        connection = connection_of(server)
        connection._all_written.clear()
        waits = asyncio.create_task(connection.emptied())
        await asyncio.sleep(0)
        connection._all_written.set()
        connection._all_written.clear()  # another frame, in the same turn
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waits.done()
        connection._all_written.set()
        await waits


async def started(client: Client, model: ScriptedModel, ids: list[str]) -> None:
    """Let the model take as many steps as it needs to start them all, and hardly more."""
    for id in ids:
        while not client.of(id, "started"):
            model.step_gate.let(1)
            await client.settle()


async def test_those_that_are_resumed_together_arrive_whole_too(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client(max_size=None) as client, server.client(max_size=None) as other:
        ids = [f"g{number}" for number in range(6)]
        for id in ids:
            await client.send(type="generate", id=id, **ASKED, resumable=True)
        await started(client, model, ids)
        client.socket.transport.abort()
        model.open()
        await eventually(lambda: all(job.ended for job in server.server.resumables))
        for id in ids:
            await other.resume(client, id, after_seq=0)
        for id in ids:
            assert (await other.done(id))["text"] == TEXT
        other.checker.quiet()


async def test_long_streamed_answers_that_are_resumed_together_arrive_whole(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client(max_size=None) as client, server.client(max_size=None) as other:
        ids = [f"g{number}" for number in range(6)]
        for id in ids:
            await client.send(type="generate", id=id, **{**ASKED, "stream": True}, resumable=True)
        await started(client, model, ids)
        client.socket.transport.abort()
        model.open()
        await eventually(lambda: all(job.ended for job in server.server.resumables))
        for id in ids:
            await other.resume(client, id, after_seq=0)
        for id in ids:
            await other.done(id)
            assert other.checker.texts[id] == TEXT
        other.checker.quiet()


async def test_many_reports_reach_a_client_that_asks_before_it_reads() -> None:
    names = [f"vendor{number}/{'m' * 90}" for number in range(100)]  # reports of 10 KB
    async with scripted(messages_per_second=1000.0) as (server, _), server.client(max_size=None) as client:
        server.models.listing |= dict.fromkeys(names, server.models.listing["wsserver/echo"])
        client.socket.transport.pause_reading()
        asking = asyncio.create_task(asked(client, 400))
        await eventually(lambda: connection_of(server)._outbox.answer_bytes > 1 << 19)
        client.socket.transport.resume_reading()
        for _ in range(400):
            await client.until("status")
        await asking


async def asked(client: Client, times: int) -> None:
    for _ in range(times):
        await client.send(type="status")
