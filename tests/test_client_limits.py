"""Each limit of connections, at it and over it: the answer has a name, and whoever is not over it is served."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from tests.conftest import Running, eventually, running
from tests.test_server import get

ELSEWHERE = ("127.0.0.2", 0)  # another address of this machine


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
