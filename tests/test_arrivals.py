"""Connections that have not said what they want: what they cost, how long they are waited for, and how they are taken."""

import asyncio
import contextlib
import errno
import itertools
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from tests.conftest import eventually, running
from tests.test_client_limits import half_open, let_in, refused
from tests.test_tls import LOOPS, files, secured, trusting
from wsserver import listener
from wsserver.arrivals import ENDS_PER_TURN, MAX_REQUEST_BYTES, Arrival
from wsserver.listener import ACCEPTS_PER_TURN, BACKLOG, Listener, listen

__all__ = ["files"]  # a fixture

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await reader.read()


class Turns:
    """Counts what happens in each turn of the loop."""

    def __init__(self) -> None:
        self.counts = Counter[int]()
        self._loop = asyncio.get_running_loop()
        self._turns = itertools.count()
        self._pass_on()

    def count(self) -> None:
        self.counts[self._turn] += 1

    def end(self) -> None:
        self._passing.cancel()

    def _pass_on(self) -> None:
        self._turn = next(self._turns)
        self._passing = self._loop.call_soon(self._pass_on)


# What is said.


async def test_a_request_that_comes_byte_by_byte_is_answered() -> None:
    async with running() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        for byte in REQUEST:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"hello\r\n", 400),
        (b"hello\n", 400),
        (b"\n", 400),
        (b"GET / HTTP/1.0\r\n", 400),
        (b"GET / HTTP/1.1\n", 400),
        (b"HEAD /healthz HTTP/1.1\r\n", 405),
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
    ],
)
async def test_what_the_server_does_not_speak_is_told_so_at_once(said: bytes, status: int) -> None:
    async with running(handshake_timeout=1000.0) as server, half_open(server, said) as reader:
        told = await answer(reader)
        assert told.startswith(f"HTTP/1.1 {status} ".encode())
        assert (b"\r\nAllow: GET\r\n" in told) == (status == 405)
        assert b"WebSocket at /ws" in told


async def test_a_request_of_the_greatest_length_is_answered_and_a_longer_one_is_not() -> None:
    async with running(handshake_timeout=1000.0) as server:
        for spare, answered in ((0, True), (1, False)):
            lines = REQUEST[:-2]
            while (missing := MAX_REQUEST_BYTES + spare - len(lines) - 2) > 0:
                filler = min(missing, 1000)
                lines += b"X: " + b"y" * max(filler - 5, 0) + b"\r\n"
            request = lines + b"\r\n"
            assert len(request) - MAX_REQUEST_BYTES == spare
            async with half_open(server, request) as reader:
                told = b""
                with contextlib.suppress(ConnectionResetError):
                    told = await answer(reader)
                assert told.startswith(b"HTTP/1.1 200 ") if answered else not told


async def test_who_says_nothing_costs_no_connection_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = ServerConnection.__init__

    def count(self: ServerConnection, *arguments: Any, **more: Any) -> None:
        made.append(1)
        make(self, *arguments, **more)

    monkeypatch.setattr(ServerConnection, "__init__", count)
    async with running(max_connections_per_address=3) as server:
        async with half_open(server), half_open(server, b"GET /ws"), half_open(server, b"GET /ws HTTP/1.1\r\nHost: x\r\n"):
            await let_in(server, 3)
            assert await refused(server) == 429
            assert not made
        await let_in(server, 0)
        async with server.client():
            assert made == [1]


# Over TLS.


@pytest.mark.parametrize("loop", LOOPS)
def test_over_tls_too_who_says_nothing_counts_and_is_given_up(loop: Callable[[], Any], files: tuple[str, str]) -> None:
    async def check() -> None:
        limits = {"max_connections_per_address": 3, "handshake_timeout": 0.5}
        trust = trusting(files[0])
        async with secured(files, **limits) as server, server.client(ssl=trust) as client, half_open(server) as silent:
            # This one speaks TLS, and then says nothing.
            reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port, ssl=trust)
            await let_in(server, 3)
            with pytest.raises((ssl.SSLError, OSError, EOFError)):
                async with server.client(ssl=trust):
                    pass
            assert (await client.generate(prompt="hello"))["joined"] == "hello"
            for waiting in (silent, reader):
                with contextlib.suppress(ConnectionResetError):
                    assert await answer(waiting) == b""
            writer.close()
            await let_in(server, 1)
            async with server.client(ssl=trust) as other:
                assert (await other.generate(prompt="hello"))["joined"] == "hello"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())


# What becomes of it.


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("over_tls", [False, True])
def test_what_is_sent_waits_for_no_acknowledgement(loop: Callable[[], Any], over_tls: bool, files: tuple[str, str]) -> None:
    async def check() -> None:
        serving = secured(files) if over_tls else running()
        async with serving as server, server.client(**{"ssl": trusting(files[0])} if over_tls else {}) as client:
            await client.settle()
            (connection,) = server.server._connections
            accepted = connection._socket.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())


# Many at once.


async def test_many_that_are_given_up_at_once_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()

    def give_up(self: Arrival, by: Callable[[Arrival], None] = Arrival.give_up) -> None:
        turns.count()
        by(self)

    monkeypatch.setattr(Arrival, "give_up", give_up)
    many = 3 * ENDS_PER_TURN
    async with running(handshake_timeout=0.2) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(many):
            await stack.enter_async_context(half_open(server))
        await let_in(server, 0)
        await eventually(lambda: turns.counts.total() == many)
    turns.end()
    assert max(turns.counts.values()) <= ENDS_PER_TURN


async def test_leaving_the_server_waits_for_nobody_who_says_nothing() -> None:
    async with running(handshake_timeout=1000.0) as server, half_open(server) as reader:
        await let_in(server, 1)
        async with asyncio.timeout(5):
            await server.server.__aexit__(None, None, None)
        with contextlib.suppress(ConnectionResetError):
            assert await answer(reader) == b""
        assert server.server.state.accounts.connections == 0


# The listener.


async def test_of_many_that_have_come_a_few_are_taken_in_a_turn_and_all_in_the_end() -> None:
    turns, taken = Turns(), []

    def take(accepted: socket.socket, peername: object) -> None:
        turns.count()
        taken.append(accepted)

    listening = await listen("127.0.0.1", 0, take)
    with contextlib.ExitStack() as sockets:
        for _ in range(100):
            sockets.enter_context(socket.create_connection(listening.sockets[0].getsockname()))
        await eventually(lambda: len(taken) == 100)
    turns.end()
    listening.close()
    for accepted in taken:
        accepted.close()
    assert max(turns.counts.values()) == ACCEPTS_PER_TURN
    assert BACKLOG >= 100


async def test_without_means_for_one_more_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[socket.socket] = []

    class Exhausted(socket.socket):
        failures = 2

        def accept(self) -> Any:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr(listener, "PAUSE", 0.01)
    exhausted = Exhausted(socket.AF_INET)
    exhausted.bind(("127.0.0.1", 0))
    listening = Listener([exhausted], lambda accepted, _: taken.append(accepted))
    with socket.create_connection(exhausted.getsockname()):
        await eventually(lambda: len(taken) == 1)
    taken[0].close()
    assert caplog.text.count("Too many open files") == 2
    monkeypatch.setattr(listener, "PAUSE", 0.0)
    exhausted.failures = 1
    with socket.create_connection(exhausted.getsockname()):
        await eventually(lambda: not exhausted.failures)
        listening.close()  # before it is tried again
        await asyncio.sleep(0)
    assert not listening.is_serving()
    assert len(taken) == 1
