"""The proxy does to a connection what it says, and nothing else."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Self

import pytest

from tests.conftest import eventually
from tests.torture.proxy import ABORT, CHUNK, Proxy

MUCH = bytes(range(256)) * 4096


class Ends:
    """A connection through the proxy, as its two ends see it."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy = proxy
        self.link = proxy.links[client.getsockname()[1]]
        self.client = client
        self.server = server

    async def round_trip(self) -> Self:
        """Send something there and back."""
        await send(self.client, b"ping")
        assert await receive(self.server, 4) == b"ping"
        await send(self.server, b"pong")
        assert await receive(self.client, 4) == b"pong"
        return self


@contextlib.asynccontextmanager
async def proxied(links: int = 1) -> AsyncIterator[list[Ends]]:
    """Make connections through one proxy."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as closing:
        server = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        async with Proxy(server.getsockname()[1]) as proxy:
            ends = []
            for _ in range(links):
                client = closing.enter_context(socket.socket())
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", proxy.port))
                accepted = closing.enter_context((await loop.sock_accept(server))[0])
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                ends.append(Ends(proxy, client, accepted))
            yield ends


async def send(side: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(side, data)


async def receive(side: socket.socket, size: int) -> bytes:
    """Give the next bytes; fewer at the connection's end."""
    data = b""
    async with asyncio.timeout(10):
        while len(data) < size and (piece := await asyncio.get_running_loop().sock_recv(side, size - len(data))):
            data += piece
    return data


def hears_nothing(side: socket.socket) -> bool:
    try:
        side.recv(1)
    except BlockingIOError:
        return True
    return False


async def fill(side: socket.socket, other: Ends) -> int:
    """Send until nobody takes any more, but at most MUCH; give how many bytes that was."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(MUCH):
            sent += side.send(MUCH[sent:])
            await other.round_trip()  # the proxy has had its turn
    return sent


async def test_bytes_and_ends_pass_in_both_directions() -> None:
    async with proxied() as [ends]:
        await ends.round_trip()
        there, back = asyncio.create_task(send(ends.client, MUCH)), asyncio.create_task(send(ends.server, MUCH[::-1]))
        assert await asyncio.gather(receive(ends.server, len(MUCH)), receive(ends.client, len(MUCH))) == [MUCH, MUCH[::-1]]
        await asyncio.gather(there, back)
        ends.client.shutdown(socket.SHUT_WR)
        assert await receive(ends.server, 1) == b""
        await send(ends.server, b"the other half is still open")
        ends.server.close()
        assert await receive(ends.client, 100) == b"the other half is still open"


async def test_a_reset_of_one_side_passes_as_a_reset() -> None:
    async with proxied() as [ends]:
        await ends.round_trip()
        ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ends.client.close()
        with pytest.raises(ConnectionResetError):
            await receive(ends.server, 1)


@pytest.mark.parametrize("frozen", [False, True])
async def test_a_cut_ends_both_sides_cleanly(frozen: bool) -> None:
    async with proxied(2) as [ends, other]:
        await ends.round_trip()
        if frozen:
            ends.link.freeze()
            await send(ends.server, b"lost")
        ends.link.cut()
        assert [await receive(side, 1) for side in (ends.client, ends.server)] == [b"", b""]
        for _ in range(3):
            await other.round_trip()  # time enough for an RST, after which nothing could be sent
        await send(ends.server, b"unheard")
        await send(ends.client, b"unheard")


async def test_a_cut_drops_what_no_reader_had_taken_yet() -> None:
    async with proxied() as [ends]:
        sending = asyncio.create_task(send(ends.server, MUCH))
        await receive(ends.client, CHUNK)
        ends.link.cut()
        assert len(await receive(ends.client, len(MUCH))) < len(MUCH) - CHUNK
        ends.client.close()
        await asyncio.gather(sending, return_exceptions=True)


async def test_a_reset_is_felt_on_both_sides() -> None:
    async with proxied(2) as [ends, other]:
        await ends.round_trip()
        await ends.link.reset()
        for side in (ends.client, ends.server):
            with pytest.raises(ConnectionResetError):
                await receive(side, 1)
        await other.round_trip()


async def test_a_frozen_link_forwards_nothing_and_loses_nothing() -> None:
    async with proxied(2) as [ends, other]:
        ends.link.freeze()
        await send(ends.server, b"later")
        await other.round_trip()
        await other.round_trip()
        assert hears_nothing(ends.client)
        ends.link.thaw()
        assert await receive(ends.client, 5) == b"later"
        await ends.round_trip()


async def test_a_frozen_link_does_not_read_so_the_sender_has_to_wait() -> None:
    async with proxied(2) as [ends, other]:
        ends.link.freeze()
        sent = await fill(ends.server, other)
        assert sent < len(MUCH)
        ends.link.thaw()
        rest = asyncio.create_task(send(ends.server, MUCH[sent:]))
        assert await receive(ends.client, len(MUCH)) == MUCH
        await rest


async def test_a_half_open_link_is_gone_for_the_client_and_silent_for_the_server() -> None:
    async with proxied(2) as [ends, other]:
        await ends.round_trip()
        await ends.link.half_open()
        assert await receive(ends.client, 1) == b""
        await send(ends.server, b"into the void")
        await other.round_trip()
        assert hears_nothing(ends.server)


async def test_a_half_open_link_fills_up() -> None:
    async with proxied(2) as [ends, other]:
        await ends.link.half_open()
        assert await fill(ends.server, other) < len(MUCH)


async def test_the_end_of_the_proxy_is_the_end_of_its_links() -> None:
    async with proxied(2) as [frozen, half_open]:
        frozen.link.freeze()
        await half_open.round_trip()
        await half_open.link.half_open()
        await frozen.proxy.__aexit__(None, None, None)
        for ends in (frozen, half_open):
            with pytest.raises(ConnectionResetError):
                await receive(ends.server, 1)


async def test_a_link_whose_clients_port_was_used_again_ends_with_the_proxy_too() -> None:
    loop = asyncio.get_running_loop()
    async with proxied() as [ends]:
        await ends.round_trip()
        await ends.link.half_open()
        port = ends.client.getsockname()[1]
        assert await receive(ends.client, 1) == b""
        ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        ends.client.close()
        with socket.socket() as again:
            again.setblocking(False)
            again.bind(("127.0.0.1", port))
            await loop.sock_connect(again, ("127.0.0.1", ends.proxy.port))
            await eventually(lambda: ends.proxy.links[port] is not ends.link)
        await ends.proxy.__aexit__(None, None, None)
        with pytest.raises(ConnectionResetError):
            await receive(ends.server, 1)


async def test_a_delayed_link_holds_every_piece_back() -> None:
    async with proxied() as [ends]:
        loop = asyncio.get_running_loop()
        ends.link.delay(0.02)
        began = loop.time()
        await ends.round_trip()
        assert loop.time() - began >= 2 * 0.02 - 0.002
        ends.link.delay(0)
        await ends.round_trip()


async def test_a_dribbling_link_forwards_byte_by_byte_in_order() -> None:
    async with proxied() as [ends]:
        ends.link.dribble()
        text = b"one byte at a time, or as good as that"
        await send(ends.client, text)
        pieces = []
        while b"".join(pieces) != text:
            pieces.append(await asyncio.get_running_loop().sock_recv(ends.server, 1000))
        assert max(map(len, pieces)) < len(text) / 4
        ends.link.dribble(on=False)
        await ends.round_trip()


async def test_who_comes_while_there_is_no_server_is_turned_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with Proxy(port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
