"""A server process that is told to stop while it has much to do, and a client that reads nothing."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.conftest import Client
from tests.test_main import LONG, Process, serving

DRAIN = 12.0  # seconds


@contextlib.asynccontextmanager
async def stalled(server: Process) -> AsyncIterator[Client]:
    """Connect a client that asks for much, reads its start and then nothing more."""
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        async with connect(server.url, sock=sock, compression=None, close_timeout=0.1) as socket_:
            client = Client(socket_)
            await client.send(type="generate", id="stalled", **LONG)
            await client.until("token")
            socket_.transport.pause_reading()
            try:
                yield client
            finally:
                socket_.transport.abort()


async def everything(client: Client) -> None:
    with pytest.raises(ConnectionClosed):
        await client.until("nothing comes any more")


async def test_under_load_and_with_a_stalled_client_it_ends_in_time_and_every_other_client_has_its_dones(
    tmp_path: Path,
) -> None:
    options = ("--max-active", "4", "--drain-timeout", str(DRAIN))
    async with serving(tmp_path, *options) as server, stalled(server), contextlib.AsyncExitStack() as connections:
        clients = [await connections.enter_async_context(server.client()) for _ in range(6)]
        for client in clients:
            for id in "abc":
                # More than there is time for, so that some of it is cut off.
                await client.send(type="generate", id=id, resumable=id == "a", **LONG | {"max_tokens": 60_000})
        await clients[0].until("token")
        for client in clients:  # what was read before the signal may end; a later one is refused
            while not client.of("c"):
                await client.receive()
        server.signal()
        told = time.monotonic()
        await asyncio.gather(*map(everything, clients))
        assert await server.ends() == 0
        assert time.monotonic() - told < DRAIN
        for client in clients:
            assert sorted(done["id"] for done in client.checker.dones) == ["a", "b", "c"]
            assert {done["finish_reason"] for done in client.checker.dones} <= {"length", "shutdown"}
            assert client.socket.close_code == 1012
        assert "Traceback" not in server.stderr
