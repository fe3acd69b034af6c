import asyncio

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.conftest import Running, running
from tests.scripted import WIDE, closing_code, put, scripted, slow_client
from wsserver import __version__
from wsserver.pages import WEB


async def get(server: Running, path: str, headers: str = "") -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost:{server.server.port}\r\n{headers}\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return int(answer.split(" ", 2)[1]), answer


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/healthz", 200),
        ("/healthz?verbose=1", 200),
        ("/", 200),
        ("/?from=somewhere", 200),
        ("/vendor/marked/LICENSE", 200),
        ("/favicon.ico", 404),
        ("/vendor", 404),
        ("/vendor/../app.js", 404),
        ("/healthz/", 404),
        ("/ws/", 404),
        ("/echo", 404),
        ("/../../etc/passwd", 404),
        ("/ws", 426),
    ],
)
async def test_a_plain_get_is_answered_by_path(echo: Running, path: str, status: int) -> None:
    answered, answer = await get(echo, path)
    assert answered == status
    assert f"Server: wsserver/{__version__}" in answer


async def test_who_is_lost_is_told_where_to_go(echo: Running) -> None:
    assert "/ws" in (await get(echo, "/nowhere"))[1]


async def test_the_page_comes_whole_and_with_its_policy_every_time(echo: Running) -> None:
    for _ in range(2):
        head, _, body = (await get(echo, "/"))[1].partition("\r\n\r\n")
        assert body == (WEB / "index.html").read_text()
        assert head.count("Content-Security-Policy: default-src 'none';") == 1
        assert head.count("Content-Length") == head.count("Server: ") == 1


async def test_without_the_page_none_of_its_files_is_served() -> None:
    async with running(page=False) as server:
        status, answer = await get(server, "/")
        assert (status, "speaks WebSocket at /ws" in answer) == (200, True)
        for path in ("/index.html", "/app.js", "/client.js"):
            assert (await get(server, path))[0] == 404


async def test_a_handshake_at_another_path_is_refused(echo: Running) -> None:
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    assert (await get(echo, "/other", upgrade + key))[0] == 404


async def test_health_is_answered_while_a_generation_runs() -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", prompt="abc")
        await model.in_step(1)
        assert (await get(server, "/healthz"))[0] == 200


async def test_the_echo_path_answers_every_message_with_itself_once_it_is_asked_for() -> None:
    async with running(echo_path=True) as server:
        async with connect(server.url.replace("/ws", "/echo?agent=x")) as socket:
            for message in ("{}", "ž" * 1000, "", b"\x00\xff", b""):
                await socket.send(message)
                assert await socket.recv() == message
        async with server.client() as client:
            assert (await client.generate(prompt="hello"))["joined"] == "hello"


async def test_readiness_follows_the_default_model_and_a_drain() -> None:
    async with scripted(loaded=False, drain_timeout=60.0) as (server, model), server.client() as client:
        model.load_gate.shut()
        status, answer = await get(server, "/readyz")
        assert (status, "the default model is not loaded yet" in answer) == (503, True)
        await client.send(type="generate", id="g", prompt="hello")
        await client.until("queued")
        status, answer = await get(server, "/readyz")
        assert (status, "the default model is loading" in answer) == (503, True)
        model.load_gate.open()
        await client.until("started")
        assert (await get(server, "/readyz"))[0] == 200
        drain = asyncio.create_task(server.server.drain())
        await client.until("goaway")
        status, answer = await get(server, "/readyz")
        assert (status, "stopping" in answer) == (503, True)
        assert (await get(server, "/healthz"))[0] == 200
        model.open()
        await client.done("g")
        await drain


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["llmstream.v1"], "llmstream.v1"),
        (["mqtt", "llmstream.v1"], "llmstream.v1"),
        (["llmstream.v2", "mqtt"], None),
        (None, None),
    ],
)
async def test_only_the_own_subprotocol_is_echoed_and_all_are_served(
    echo: Running, offered: list[str] | None, chosen: str | None
) -> None:
    async with echo.client(subprotocols=offered) as client:
        assert client.socket.subprotocol == chosen
        assert (await client.generate(id="g", prompt="hello"))["joined"] == "hello"


async def test_a_drain_lets_running_generations_finish_and_starts_no_new_ones() -> None:
    async with scripted(max_active=1, drain_timeout=60.0) as (server, model), server.client() as client:
        await client.send(type="generate", id="running", prompt="hello")
        await model.in_step(1)
        await client.send(type="generate", id="waiting", prompt="world")
        await client.settle()
        drain = asyncio.create_task(server.server.drain())
        # Five seconds of the sixty are for the closing.
        assert 50_000 < (await client.until("goaway"))["deadline_ms"] <= 55_000
        await client.send(type="generate", id="late", prompt="no")
        assert (await client.until("done"))["error"]["code"] == "shutting_down"
        await client.send(type="init", id="load")
        assert (await client.until("error"))["code"] == "shutting_down"
        assert (await client.settle())["server"]["draining"] is True
        model.open()
        assert await closing_code(client) == 1012
        await drain
        assert client.checker.texts == {"late": "", "running": "hello", "waiting": "world"}
        assert [done["finish_reason"] for done in client.checker.dones] == ["error", "stop", "stop"]
        client.checker.quiet()


async def test_past_the_deadline_of_a_drain_everything_ends_with_shutdown() -> None:
    async with scripted(max_active=1, drain_timeout=0.0) as (server, model), server.client() as client:
        await client.send(type="generate", id="running", prompt="hello")
        model.step_gate.let(2)
        await model.in_step(3)
        await client.send(type="generate", id="queued", prompt="world")
        loading = put(server.models, "test/loading")
        loading.load_gate.shut()
        await client.send(type="init", id="load", model="test/loading")
        await client.send(type="generate", id="waits for the load", prompt="!")
        await loading.in_load_stage(1)
        drain = asyncio.create_task(server.server.drain())
        await client.until("done", id="waits for the load")
        model.step_gate.let(1)
        assert await closing_code(client) == 1012
        await drain
        client.checker.quiet()
        assert {done["finish_reason"] for done in client.checker.dones} == {"shutdown"}
        assert client.checker.texts == {"running": "he", "queued": "", "waits for the load": ""}
        assert [frame["code"] for frame in client.of("load", "error")] == ["shutting_down"]
        assert not model.steps_of("queued")


async def test_a_cancel_read_before_the_drains_deadline_stays_a_cancel() -> None:
    async with scripted(drain_timeout=0.0) as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="hello")
        await model.in_step(1)
        await client.send(type="cancel", id="g")
        await client.settle()
        drain = asyncio.create_task(server.server.drain())
        await client.until("goaway")
        model.open()
        assert (await client.until("done"))["finish_reason"] == "cancelled"
        assert await closing_code(client) == 1012
        await drain


async def test_who_connects_during_a_drain_is_refused_and_closed_with_the_others() -> None:
    async with scripted(drain_timeout=60.0) as (server, model), server.client() as old:
        await old.send(type="generate", id="g", prompt="hello")
        await model.in_step(1)
        drain = asyncio.create_task(server.server.drain())
        await old.until("goaway")
        async with server.client() as new:
            await new.send(type="generate", id="g", prompt="hello")
            assert (await new.until("done"))["error"]["code"] == "shutting_down"
            model.open()
            assert await closing_code(new) == 1012
        assert await closing_code(old) == 1012
        assert old.checker.texts == {"g": "hello"}
        await drain


async def test_a_drain_ends_though_a_client_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsserver.connection.CLOSE_TIMEOUT", 0.1)
    monkeypatch.setattr("wsserver.server.CLOSE_TIMEOUT", 0.1)
    async with scripted(drain_timeout=0.0) as (server, model), slow_client(server) as deaf, server.client() as client:
        deaf.socket.transport.pause_reading()
        model.open()
        await deaf.send(type="generate", id="deaf", prompt=WIDE * 50)
        await model.freed_of("deaf")
        model.step_gate.shut()
        await client.send(type="generate", id="g", prompt="hello")
        await model.in_step_of("g")
        drain = asyncio.create_task(server.server.drain())
        await client.until("goaway")
        model.open()
        assert await closing_code(client) == 1012
        await drain
        async with asyncio.timeout(8.0):  # less than the library's own patience
            await server.server.__aexit__(None, None, None)
        deaf.socket.transport.resume_reading()
        with pytest.raises(ConnectionClosed):
            await deaf.until("nothing comes any more")


async def test_a_drain_stops_nothing_of_a_client_that_is_being_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsserver.connection.CLOSE_TIMEOUT", 0.1)
    async with scripted(drain_timeout=0.0) as (server, model), slow_client(server) as deaf:
        await deaf.send(type="generate", id="g", prompt="hello")
        await model.in_step_of("g")
        deaf.socket.transport.pause_reading()
        (connection,) = server.server._connections
        connection.give_up("the test says so")
        await server.server.drain()
        assert not server.server._connections
        model.open()


async def test_leaving_the_server_closes_clients_that_were_not_drained() -> None:
    async with running() as server, server.client() as client:
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        await server.server.__aexit__(None, None, None)
        assert await closing_code(client) == 1001
