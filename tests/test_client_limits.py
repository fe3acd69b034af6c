"""Each limit over real sockets, at it and over it: the answer has a name, and whoever is not over it is served."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode

from tests.conftest import Client, Running, eventually, running
from tests.scripted import closing_code, in_engine, scripted
from tests.test_auth import BOB, KEY, bearer, keys
from tests.test_server import get
from wsserver.accepted import PIECE, Accepted
from wsserver.reading import FRAMES_PER_TURN

ELSEWHERE = ("127.0.0.2", 0)  # another address of this machine


def frame(opcode: Opcode, data: bytes, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin=fin).serialize(mask=True)


async def refused(server: Running, **options: Any) -> int:
    """Give the status with which a handshake is refused."""
    with pytest.raises(InvalidStatus) as refusal:
        async with server.client(**options):
            pass
    assert int(refusal.value.response.headers["Retry-After"]) >= 1
    return refusal.value.response.status_code


@contextlib.asynccontextmanager
async def half_open(server: Running, said: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    """Connect, and never finish the handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
    writer.write(said)
    try:
        yield reader
    finally:
        writer.close()


async def let_in(server: Running, connections: int) -> None:
    """Wait until the server knows of so many connections."""
    await eventually(lambda: server.server.state.accounts.connections == connections)


# Connections.


async def test_one_connection_too_many_from_an_address_is_refused_and_another_address_is_served() -> None:
    async with running(max_connections_per_address=2) as server:
        async with server.client() as first, server.client() as second:
            assert await refused(server) == 429
            async with server.client(local_addr=ELSEWHERE) as other:
                for client in (first, second, other):
                    assert (await client.generate(prompt="hello"))["joined"] == "hello"
        await let_in(server, 0)
        async with server.client(), server.client() as again:
            assert (await again.generate(prompt="hello"))["joined"] == "hello"


async def test_one_connection_too_many_in_all_is_refused_whoever_comes() -> None:
    async with running(max_connections=2) as server, server.client() as first, server.client():
        assert await refused(server, local_addr=ELSEWHERE) == 503
        assert (await first.generate(prompt="hello"))["joined"] == "hello"


@pytest.mark.parametrize("said", [b"", b"GET /ws HTT", b"GET /ws HTTP/1.1\r\nHost: here\r\n"])
async def test_a_handshake_that_is_not_finished_counts_as_a_connection_and_is_given_up(said: bytes) -> None:
    limits = {"max_connections_per_address": 2, "handshake_timeout": 0.5}
    async with running(**limits) as server, server.client() as client, half_open(server, said) as reader:
        await let_in(server, 2)
        assert await refused(server) == 429
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await let_in(server, 1)
        async with server.client() as other:
            assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_a_request_that_does_not_end_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server:
        async with half_open(server, b"GET /ws HTTP/1.1\r\n" + b"X: " + b"y" * 1000 + b"\r\n") as reader:
            await let_in(server, 1)
            assert not reader.at_eof()
        async with half_open(server, b"GET /ws HTTP/1.1\r\n" + (b"X: " + b"y" * 1000 + b"\r\n") * 17) as reader:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        await let_in(server, 0)
    assert not caplog.records


async def test_one_handshake_too_many_in_a_time_is_refused_also_if_the_others_have_gone() -> None:
    async with running(handshakes_per_second=0.2) as server:
        for _ in range(2):
            async with server.client() as client:
                await client.settle()
        assert await refused(server) == 429
        async with server.client(local_addr=ELSEWHERE) as other:
            await other.settle()


async def test_what_a_page_loads_takes_no_handshake_and_has_a_bound_of_its_own() -> None:
    async with running(handshakes_per_second=0.2) as server:
        for _ in range(18):
            assert (await get(server, "/"))[0] == 200
        for _ in range(2):
            async with server.client() as client:
                await client.settle()
        statuses = [(await get(server, "/"))[0] for _ in range(20)]  # faster than two of them come back a second
        assert 429 in statuses


async def test_fifty_tabs_that_open_at_once_behind_one_address_are_all_served() -> None:
    async with running() as server:

        async def load(files: int) -> None:
            for _ in range(files):
                assert (await get(server, "/"))[0] == 200

        async def tab() -> None:
            await asyncio.gather(*(load(3) for _ in range(6)))  # a browser's six connections
            async with server.client() as client:
                assert (await client.generate(prompt="hello"))["joined"] == "hello"
                await all_are_there.wait()

        all_are_there = asyncio.Barrier(50)
        await asyncio.gather(*(tab() for _ in range(50)))


async def test_who_is_refused_leaves_nothing_behind() -> None:
    async with running(max_connections_per_address=1) as server, server.client() as client:
        await client.settle()
        tasks = asyncio.all_tasks()
        for _ in range(20):
            async with half_open(server) as reader:
                assert (await reader.read()).startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        await eventually(lambda: asyncio.all_tasks() <= tasks)
        assert server.server.state.accounts.connections == 1


# Messages and frames.


async def test_messages_over_the_rate_get_an_error_or_their_done_and_a_cancel_is_taken() -> None:
    async with scripted(messages_per_second=0.5) as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="hello")
        await model.in_step(1)
        for _ in range(4):
            await client.settle()
        await client.send(type="status")
        error = await client.until("error")
        assert (error["code"], 0 < error["retry_after_ms"] <= 2000) == ("rate_limited", True)
        await client.send(type="generate", id="late", prompt="hello")
        done = await client.done("late")
        assert (done["error"]["code"], 0 < done["error"]["retry_after_ms"] <= 2000) == ("rate_limited", True)
        await client.send(type="generate", id="g", prompt="hello")
        assert (await client.until("error"))["code"] == "rate_limited"
        await client.send(type="cancel", id="g")
        await client.send(type="status")
        assert (await client.until("error"))["code"] == "rate_limited"  # and so the cancel was read
        model.open()
        assert (await client.done("g"))["finish_reason"] == "cancelled"


async def test_who_does_not_slow_down_is_closed_and_another_connection_is_served() -> None:
    async with running(messages_per_second=0.1) as server, server.client() as client, server.client() as other:
        for _ in range(40):
            await client.send(type="status")
        assert await closing_code(client) == 4429
        assert [frame["type"] for frame in client.frames] == ["status", *["error"] * 32]
        assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_a_flood_of_cancels_is_closed_too() -> None:
    async with running(messages_per_second=0.1) as server, server.client() as client:
        for number in range(40):
            await client.send(type="cancel", id=f"somebody's {number}")
        assert await closing_code(client) == 4429


async def test_a_new_connection_does_not_let_a_client_say_more_than_ten_may() -> None:
    async with running(messages_per_second=0.1) as server:
        for _ in range(10):
            async with server.client() as client:
                await client.settle()
        async with server.client() as client, server.client(local_addr=ELSEWHERE) as other:
            await client.send(type="status")
            error = await client.until("error")
            assert (error["code"], 0 < error["retry_after_ms"] <= 1000) == ("rate_limited", True)
            await other.settle()


async def test_a_long_message_counts_for_several() -> None:
    async with running(messages_per_second=0.5) as server, server.client() as client:
        await client.send(type="status", unknown="x" * 5 * 4096)
        await client.until("status")
        await client.send(type="status")
        assert (await client.until("error"))["code"] == "rate_limited"


@pytest.mark.parametrize(
    "wire",
    [
        frame(Opcode.PING, b"x" * 125),
        frame(Opcode.PONG, b""),
        frame(Opcode.CONT, b"", fin=False),
    ],
    ids=["pings", "pongs", "pieces"],
)
async def test_a_flood_of_frames_is_closed_and_another_connection_is_served(wire: bytes) -> None:
    async with running(messages_per_second=1.0) as server, server.client() as client, server.client() as other:
        client.checker.sent({"type": "status"})
        client.socket.transport.write(frame(Opcode.TEXT, b'{"type":"status"', fin=False))
        client.socket.transport.write(wire * 100)
        client.socket.transport.write(frame(Opcode.CONT, b"}"))
        await client.until("status")
        client.socket.transport.write(frame(Opcode.TEXT, b" ", fin=False) + wire * 5000)
        assert await closing_code(client) == 4429
        assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_an_address_that_floods_is_let_in_no_more_for_a_while_and_who_is_in_stays() -> None:
    async with running(messages_per_second=0.1) as server, server.client() as neighbour:
        async with server.client() as client:
            client.socket.transport.write(200 * frame(Opcode.PING, b""))
            assert await closing_code(client) == 4429
        assert await refused(server) == 429
        assert (await neighbour.generate(prompt="hello"))["joined"] == "hello"
        async with server.client(local_addr=ELSEWHERE) as other:
            assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_many_frames_that_came_at_once_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, turns, parsed = asyncio.get_running_loop(), itertools.count(), Counter[int]()

    def parse(self: Accepted, event: Any, by: Callable[[Any, Any], None] = Accepted.process_event) -> None:
        parsed[turn[0]] += 1
        by(self, event)

    def pass_on() -> None:
        turn[0] = next(turns)
        passing[0] = loop.call_soon(pass_on)

    turn, passing = [0], [loop.call_soon(lambda: None)]
    pass_on()
    monkeypatch.setattr(Accepted, "process_event", parse)
    async with running() as server, server.client() as client, server.client() as other:
        for flooding in (client, other):
            flooding.socket.transport.write(1500 * frame(Opcode.PING, b""))
        for flooding in (client, other):
            await flooding.settle()
    passing[0].cancel()
    assert sum(parsed.values()) > 3000
    assert max(parsed.values()) <= FRAMES_PER_TURN + PIECE // len(frame(Opcode.PING, b""))


async def test_who_waits_for_a_turn_is_read_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as server, server.client() as client:
        await client.settle()
        (connection,) = server.server._connections
        accepted = cast(Accepted, connection._socket)
        monkeypatch.setattr(server.server._reading, "_parse", lambda: None)
        client.socket.transport.write(10 * frame(Opcode.PING, b""))
        await eventually(lambda: bool(accepted._unparsed))
        assert not accepted.transport.is_reading()
        monkeypatch.undo()
        server.server._reading._parse()
        await client.settle()
        assert accepted.transport.is_reading()


async def test_who_was_cut_off_is_read_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bool] = []

    def reading(self: Accepted, data: bytes, read_by: Callable[[Any, bytes], None] = ServerConnection.data_received) -> None:
        read.append(self._is_cut_off)
        read_by(self, data)

    monkeypatch.setattr(ServerConnection, "data_received", reading)
    async with running(messages_per_second=1.0) as server, server.client() as client:
        for _ in range(100):
            client.socket.transport.write(1000 * frame(Opcode.PING, b""))
        assert await closing_code(client) == 4429
    assert read
    assert not any(read)


async def test_a_frame_that_says_it_is_compressed_is_no_frame() -> None:
    async with running() as server, server.client() as client:
        plain = frame(Opcode.TEXT, b"\x00" * 100)
        client.socket.transport.write(bytes([plain[0] | 0b100_0000]) + plain[1:])
        assert await closing_code(client) == 1002


async def test_the_bytes_and_the_depth_of_a_message_are_as_the_operator_says() -> None:
    async with running(max_message_bytes=100, max_json_depth=3) as server, server.client() as client:
        await client.send(type="init", id="i")
        assert (await client.until("ready"))["limits"]["max_message_bytes"] == 100
        await client.send_text('{"type":"status","x":[[1]]}'.ljust(100))
        await client.until("status")
        await client.send_text('{"x":[[[1]]]}')
        assert (await client.until("error"))["code"] == "bad_json"
        await client.send_text("{}".ljust(101))
        assert await closing_code(client) == 1009


# Requests.


async def test_one_request_too_many_of_a_connection_is_refused_and_the_others_go_on() -> None:
    async with scripted(max_requests_per_connection=2) as (server, model), server.client() as client:
        for id in ("first", "second", "third"):
            await client.send(type="generate", id=id, prompt="hello")
        assert (await client.until("done"))["error"]["code"] == "overloaded"
        async with server.client() as other:
            model.open()
            assert (await other.generate(prompt="hello"))["joined"] == "hello"
        await client.done("first")
        await client.done("second")
        assert client.checker.texts == {"first": "hello", "second": "hello", "third": ""}
        assert (await client.generate(id="fourth", prompt="hello"))["joined"] == "hello"


async def test_the_connections_of_one_address_share_a_bound_of_requests() -> None:
    async with scripted(max_requests_per_key=2) as (server, model), server.client() as client, server.client() as same:
        await client.send(type="generate", id="a", prompt="hello")
        await same.send(type="generate", id="b", prompt="hello")
        await in_engine(server, 2)
        await client.send(type="generate", id="c", prompt="hello")
        done = await client.done("c")
        assert (done["error"]["code"], "2 requests of this client" in done["error"]["message"]) == ("overloaded", True)
        async with server.client(local_addr=ELSEWHERE) as other:
            await other.send(type="generate", id="d", prompt="hello")
            await in_engine(server, 3)
            model.open()
            await other.done("d")
            assert other.checker.texts == {"d": "hello"}
        await same.done("b")
        assert (await same.generate(id="e", prompt="hello"))["joined"] == "hello"


async def test_a_key_shares_a_bound_from_wherever_it_comes_and_another_key_beside_it_has_its_own() -> None:
    alice, bob = bearer(KEY), bearer(BOB)
    async with scripted(keys=keys(), max_requests_per_key=1) as (server, model), server.client(**alice) as client:
        await client.send(type="generate", id="a", prompt="hello")
        await in_engine(server, 1)
        async with server.client(local_addr=ELSEWHERE, **alice) as same, server.client(**bob) as other:
            done = await same.generate(id="b", prompt="hello")
            assert (done["error"]["code"], "1 requests of this client" in done["error"]["message"]) == ("overloaded", True)
            model.open()
            assert (await other.generate(id="c", prompt="hello"))["joined"] == "hello"
        await client.done("a")
        assert client.checker.texts == {"a": "hello"}


async def test_tokens_of_a_key_are_counted_wherever_it_comes_from() -> None:
    async with running(keys=keys(), tokens_per_minute=6) as server, server.client(**bearer(KEY)) as client:
        assert (await client.generate(id="a", prompt="hello"))["joined"] == "hello"
        async with server.client(local_addr=ELSEWHERE, **bearer(KEY)) as same, server.client(**bearer(BOB)) as other:
            assert (await same.generate(id="b", prompt="hello"))["error"]["code"] == "rate_limited"
            assert (await other.generate(id="c", prompt="hello"))["joined"] == "hello"


async def test_requests_that_wait_have_a_bound_of_their_own() -> None:
    async with scripted(max_active=1, max_queued_per_key=1) as (server, model), server.client() as client:
        await client.send(type="generate", id="runs", prompt="hello")
        await client.until("started")
        await client.send(type="generate", id="waits", prompt="hello")
        await client.send(type="generate", id="refused", prompt="hello")
        done = await client.done("refused")
        assert (done["error"]["code"], "1 requests of this client wait" in done["error"]["message"]) == ("overloaded", True)
        model.open()
        await client.until("started", id="waits")
        assert (await client.generate(id="again", prompt="hello"))["joined"] == "hello"


async def test_a_lost_connections_requests_count_until_they_are_gone_and_no_longer() -> None:
    async with scripted(max_requests_per_key=2) as (server, model), server.client() as client:
        async with server.client() as lost:
            await lost.send(type="generate", id="lost", prompt="hello")
            await model.in_step(1)
            await lost.send(type="generate", id="kept", prompt="hello", resumable=True)
            await in_engine(server, 2)
            model.step_gate.let(2)
            await lost.until("started", id="kept")
            assert (await client.generate(id="a", prompt="hello"))["error"]["code"] == "overloaded"
        await eventually(lambda: account(server).requests == 1)
        await client.send(type="generate", id="b", prompt="hello")
        await client.settle()
        assert (await client.generate(id="c", prompt="hello"))["error"]["code"] == "overloaded"
        model.open()
        await eventually(lambda: account(server).requests == 0)
        assert account(server).queued == 0


def account(server: Running) -> Any:
    """Give the account of those who come from this machine's usual address."""
    (found,) = server.server.state.accounts._accounts.values()
    return found


# Tokens.


async def test_prompts_and_answers_are_as_long_as_the_operator_says() -> None:
    async with running(max_prompt_tokens=5, max_tokens=3) as server, server.client() as client:
        await client.send(type="init", id="i")
        limits = (await client.until("ready"))["limits"]
        assert (limits["max_prompt_tokens"], limits["max_tokens"]) == (5, 3)
        done = await client.generate(id="unsaid", prompt="hello")
        assert (done["joined"], done["finish_reason"]) == ("hel", "length")
        assert (await client.generate(id="at", prompt="hello", max_tokens=3))["finish_reason"] == "length"
        for field in ("max_tokens", "min_tokens"):
            error = (await client.generate(id=field, prompt="hello", **{field: 4}))["error"]
            assert (error["code"], error["message"].partition(":")[0]) == ("bad_message", f"$.{field}")
        for message in ({"prompt": "hello!"}, {"messages": [{"role": "user", "content": "hello!"}]}):
            error = (await client.generate(id="long", **message))["error"]
            field = next(iter(message))
            assert (error["code"], error["message"].partition(":")[0]) == ("context_length_exceeded", f"$.{field}")


async def test_without_a_limit_of_tokens_none_is_told(client: Client) -> None:
    await client.send(type="init", id="i")
    assert set((await client.until("ready"))["limits"]) == {"max_message_bytes", "max_active"}


async def test_tokens_are_counted_by_the_minute_over_all_connections_of_a_client() -> None:
    async with running(tokens_per_minute=12) as server, server.client() as client, server.client() as same:
        assert (await client.generate(id="a", prompt="hello"))["usage"]["completion_tokens"] == 6  # and 5 of the prompt
        assert (await same.generate(id="b", prompt="hello"))["joined"] == "hello"  # there was one left
        error = (await client.generate(id="c", prompt="hello"))["error"]
        assert error["code"] == "rate_limited"
        assert 50_000 < error["retry_after_ms"] <= 55_000  # eleven tokens, five seconds each
        async with server.client(local_addr=ELSEWHERE) as other:
            assert (await other.generate(id="d", prompt="hello"))["joined"] == "hello"
        await client.settle()  # what costs no tokens is served


@pytest.mark.parametrize("lost", [True, False])
async def test_a_generation_that_is_cancelled_or_lost_has_cost_what_it_made(lost: bool) -> None:
    async with scripted(tokens_per_minute=8) as (server, model), server.client() as client:
        async with server.client() as other:
            await other.send(type="generate", id="g", prompt="hello", ignore_eos=True)
            for _ in range(3):
                model.step_gate.let()
                await other.until("token")
            if not lost:
                await other.send(type="cancel", id="g")
                model.open()
                await other.done("g")
        model.open()
        await eventually(lambda: account(server).requests == 0)
        assert (await client.generate(id="g", prompt="hello"))["error"]["code"] == "rate_limited"


async def test_what_is_over_when_all_have_gone_is_nothing() -> None:
    async with running() as server:
        for _ in range(3):
            async with server.client() as client:
                await client.generate(prompt="hello")
                await client.send(type="generate", prompt="x" * 1000, ignore_eos=True)
                await client.until("started")
        await let_in(server, 0)
        await eventually(lambda: not account(server).used)
