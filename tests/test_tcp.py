import asyncio
import socket
import sys
import time

import pytest

from tests.conftest import Running, eventually, running
from tests.scripted import WIDE, closing_code, in_engine, scripted, slow_client
from wsserver import tcp
from wsserver.connection import Connection
from wsserver.liveness import Traffic

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a peer has taken")


def only(server: Running) -> Connection:
    (connection,) = server.server._connections
    return connection


def traffic(server: Running) -> Traffic:
    return tcp.traffic(only(server)._socket.transport)  # type: ignore[arg-type]


async def test_what_a_peer_takes_and_says_is_told_by_the_kernel(echo: Running) -> None:
    async with echo.client() as client:
        await client.settle()
        await eventually(lambda: traffic(echo).outstanding == 0)
        before = traffic(echo)
        await client.generate(prompt="hello")
        await eventually(lambda: traffic(echo).outstanding == 0)
        after = traffic(echo)
        assert after.received > before.received + len('{"type":"generate","prompt":"hello"}')
        assert after.acknowledged > before.acknowledged + 5 * len('{"type":"token"}')


async def test_accepted_sockets_hold_little_unsent_and_give_up_after_the_stall_timeout() -> None:
    async with running(stall_timeout=7.0) as server, server.client() as client:
        await client.settle()
        accepted = only(server)._socket.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 16_384
        # Later than the server itself, which says why before it goes.
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 11_000


async def test_who_takes_nothing_is_given_up_with_its_work_though_its_outbox_has_room() -> None:
    async with scripted(stall_timeout=0.5) as (server, model), server.client() as other, slow_client(server) as client:
        await other.send(type="generate", id="other", prompt="left alone")
        await in_engine(server, 1)
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="stalled", prompt=WIDE * 50, ignore_eos=True)
        await in_engine(server, 2)
        model.step_gate.let(100)
        # Neither lets its generations end by themselves: what ends them is that nothing moves for half a second.
        await eventually(lambda: model.frees("other") == 1)
        assert len(server.server._connections) == 2
        await eventually(lambda: bool(model.step_gate.let()) or model.frees("stalled") == 1)
        client.socket.transport.resume_reading()
        assert await closing_code(client) == 4413
        assert (await other.done("other"))["finish_reason"] == "stop"


async def test_who_takes_something_between_two_looks_is_not_given_up_and_then_is() -> None:
    async with scripted(stall_timeout=1000.0) as (server, model), slow_client(server) as client:
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="slow", prompt=WIDE * 50, ignore_eos=True, max_tokens=120)
        model.open()
        await model.freed_of("slow")
        await eventually(lambda: traffic(server).outstanding > 0)
        connection, start = only(server), time.monotonic()
        liveness = server.server._connections[connection]
        for nth in range(10):
            taken = traffic(server).acknowledged
            client.socket.transport.resume_reading()
            await eventually(lambda taken=taken: traffic(server).acknowledged > taken)  # type: ignore[misc]
            client.socket.transport.pause_reading()
            connection.look(liveness, start + 900 * nth)
        connection.look(liveness, start + 900 * 9 + 1000)
        client.socket.transport.resume_reading()
        assert await closing_code(client) == 4413


async def test_who_answers_no_ping_is_closed_though_its_kernel_takes_them(echo: Running) -> None:
    async with echo.client() as client:
        await client.settle()
        connection, now = only(echo), time.monotonic()
        liveness = echo.server._connections[connection]
        connection.look(liveness, now)
        connection.look(liveness, now + 27)
        await client.settle()
        await eventually(lambda: traffic(echo).outstanding == 0)
        connection.look(liveness, now + 30)
        connection.look(liveness, now + 60)
        assert await closing_code(client) == 1011


async def test_an_idle_client_is_pinged_and_left_alone() -> None:
    async with running(stall_timeout=0.3) as server, server.client() as client:
        await client.settle()
        before = traffic(server)
        ended = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(1.0, ended.set_result, None)
        await ended
        assert traffic(server).received >= before.received + 5 * len("pong")
        await client.settle()
