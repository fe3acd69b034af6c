"""`/ws?once=1`: a connection that is closed once it has had its answer."""

import pytest

from tests.conftest import Running, eventually
from tests.scripted import WIDE, closing_code, in_engine, scripted, slow_client


def once(server: Running, query: str = "once=1") -> Running:
    server.url += f"?{query}"
    return server


@pytest.mark.parametrize("query", ["once=1", "color=red&once=1", "once=1&"])
async def test_it_is_closed_with_1000_after_its_first_done(echo: Running, query: str) -> None:
    async with once(echo, query).client() as client:
        await client.send(type="status")
        await client.send(type="init", id="i")
        await client.until("ready")
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        assert await closing_code(client) == 1000


@pytest.mark.parametrize("query", ["once", "once=0", "once=10", "nonce=1", "ONCE=1", ""])
async def test_any_other_one_stays_open(echo: Running, query: str) -> None:
    async with once(echo, query).client() as client:
        await client.generate(prompt="hello")
        await client.settle()


async def test_a_refusal_is_an_answer_too(echo: Running) -> None:
    async with once(echo).client() as client:
        await client.send(type="generate", id="g", prompt="hello", temperature=11)
        assert (await client.until("done"))["error"]["code"] == "bad_message"
        assert await closing_code(client) == 1000


async def test_an_error_is_none_so_that_a_line_can_be_mistyped(echo: Running) -> None:
    async with once(echo).client() as client:
        await client.send_text("hello?")
        await client.until("error")
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        assert await closing_code(client) == 1000


async def test_what_else_it_runs_ends_with_it() -> None:
    async with scripted() as (server, model), once(server).client() as client:
        await client.send(type="generate", id="long", prompt="x" * 100)
        await model.in_step(1)
        await client.send(type="generate", id="short", prompt="y", max_tokens=1)
        await in_engine(server, 2)
        model.step_gate.let(3)
        await client.until("done", id="short")
        assert await closing_code(client) == 1000
        model.open()
        await model.freed_of("long")
        assert len(model.steps_of("long")) < 100


async def test_a_slow_reader_gets_all_of_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsserver.connection.CLOSE_TIMEOUT", 0.0)
    async with scripted() as (server, model), slow_client(once(server)) as client:
        client.socket.transport.pause_reading()
        model.open()
        await client.send(type="generate", id="g", prompt=WIDE * 50)
        await model.freed_of("g")
        (connection,) = server.server._connections
        await eventually(lambda: connection._leaver is not None)
        client.socket.transport.resume_reading()
        assert (await client.until("done"))["finish_reason"] == "stop"
        assert client.checker.texts == {"g": WIDE * 50}
        assert await closing_code(client) == 1000
