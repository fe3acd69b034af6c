"""A TCP proxy that breaks: each connection through it is a link, and a test decides what becomes of it.

Knows bytes only. It reads no more than it can hand on, so a side that does not read is felt on the other.
"""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self

# What a server behind it has to be told as `allow_host`: any port, for a client names the one that it connects to.
PROXIED = ("127.0.0.1",)
CHUNK = 2048  # bytes read at once: the most that a frozen link still takes in
BUFFER = 4096  # bytes that the kernel holds for the proxy in each direction, so that back-pressure comes soon
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: a close that sends RST


class Link:
    """One connection through the proxy: two sockets, and two pumps between them."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client = client
        self._server = server
        self._pumps: list[asyncio.Task[None]] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._is_cut = False
        self._latency = 0.0
        self._piece = CHUNK
        self.forwarded = 0  # bytes, in both directions

    def __repr__(self) -> str:
        flow = "flowing" if self._flowing.is_set() else "frozen"
        pace = f"{self._latency} s late, {self._piece} bytes at a time"
        return f"<a link that is {flow}, {pace}, cut: {self._is_cut}, {self.forwarded} bytes so far>"

    def start(self) -> asyncio.Task[None]:
        """Begin to forward; give what ends with the link."""
        directions = ((self._client, self._server), (self._server, self._client))
        self._pumps = [asyncio.create_task(self._pump(source, sink)) for source, sink in directions]
        return asyncio.create_task(self._run())

    def close(self) -> None:
        """Let go of both sockets."""
        self._client.close()
        self._server.close()

    # What can befall it.

    def cut(self) -> None:
        """End it for both sides as if the other had hung up; what is on its way is lost."""
        self._is_cut = True
        self._flowing.set()
        for side in (self._client, self._server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_WR)

    async def reset(self) -> None:
        """End it for both sides with an RST."""
        await self._stop()
        for side in (self._client, self._server):
            if side.fileno() >= 0:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        self.close()

    async def half_open(self) -> None:
        """Let the client vanish without a word: the server's socket stays open, and is neither read nor written."""
        await self._stop()
        self._client.close()

    def freeze(self) -> None:
        """Forward nothing, and read nothing."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Go on after a freeze; nothing was lost."""
        self._flowing.set()

    def delay(self, seconds: float) -> None:
        """Hold back every piece for so long, in both directions."""
        self._latency = seconds

    def dribble(self, *, on: bool = True) -> None:
        """Forward one byte at a time."""
        self._piece = 1 if on else CHUNK

    async def _run(self) -> None:
        """Wait until both sides have ended, or one has failed; what one side sees of the end, the other sees too."""
        done, _ = await asyncio.wait(self._pumps, return_when=asyncio.FIRST_EXCEPTION)
        if any(pump.cancelled() for pump in done):
            return  # a fault has taken over
        await self._stop()
        if self._is_cut or not any(pump.exception() for pump in done):
            self.close()
        else:
            await self.reset()

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, CHUNK):
            await self._flowing.wait()
            if self._latency:
                await _pass(self._latency)
            while data and not self._is_cut:
                piece, data = data[: self._piece], data[self._piece :]
                await loop.sock_sendall(sink, piece)
                self.forwarded += len(piece)
                await asyncio.sleep(0)  # or a dribble would not be one
        if not self._is_cut:
            sink.shutdown(socket.SHUT_WR)

    async def _stop(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        # A socket may be closed only when the loop has stopped to watch it.
        await asyncio.gather(*self._pumps, return_exceptions=True)


class Proxy:
    """Listens on a free port of this machine and connects whoever comes to the server; an async context manager."""

    def __init__(self, port: int) -> None:
        self._upstream = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._tasks: set[asyncio.Task[None]] = set()
        # By the port that the client connected from; the latest, where one was used again.
        self.links: dict[int, Link] = {}
        self._all_links: list[Link] = []

    @property
    def port(self) -> int:
        """The port it listens on."""
        port: int = self._listener.getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        _prepare(self._listener)
        self._keep(asyncio.create_task(self._accept()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        for link in self._all_links:
            await link.reset()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, address = await loop.sock_accept(self._listener)
            server = socket.socket()
            _prepare(client)
            _prepare(server)
            link = self.links[address[1]] = Link(client, server)
            self._all_links.append(link)
            try:
                await loop.sock_connect(server, self._upstream)
            except OSError:
                await link.reset()
            else:
                self._keep(link.start())

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _prepare(side: socket.socket) -> None:
    side.setblocking(False)
    side.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _pass(seconds: float) -> None:
    """Let time pass: the one place where that is the point."""
    passed = asyncio.Event()  # no future, which a cancel in the very turn in which the time is over would have ended
    timer = asyncio.get_running_loop().call_later(seconds, passed.set)
    try:
        await passed.wait()
    finally:
        timer.cancel()
