"""The listening sockets: takes what has come to them a few connections at a time, and knows nothing of what comes of one.

The event loop's own listener makes a transport for each of any number that came at once, before it can be turned away.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger(__name__)

# How many may wait in the system's line, and how many of them are taken before everything else has its turn.
BACKLOG = 1024
ACCEPTS_PER_TURN = 4
# Seconds until it is tried again where the system has no means for one more.
PAUSE = 1.0

# What takes a connection, and its peer's address.
Take = Callable[[socket.socket, Any], None]


class Listener:
    """Some listening sockets; what the library asks of an `asyncio.Server`."""

    def __init__(self, sockets: Sequence[socket.socket], take: Take) -> None:
        self.sockets = sockets
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._closed = False
        for listening in sockets:
            listening.setblocking(False)
            listening.listen(BACKLOG)
            self._loop.add_reader(listening, self._accept, listening)

    def close(self) -> None:
        """Listen no more."""
        self._closed = True
        for listening in self.sockets:
            self._loop.remove_reader(listening)
            listening.close()

    async def wait_closed(self) -> None:
        """Wait for nothing: whoever took a connection ends it."""

    def is_serving(self) -> bool:
        """Whether it listens."""
        return not self._closed

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Give its event loop."""
        return self._loop

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot take a connection (%s); trying again in %g s", error, PAUSE)
                self._loop.remove_reader(listening)
                self._loop.call_later(PAUSE, self._go_on, listening)
                return
            accepted.setblocking(False)
            self._take(accepted, address)

    def _go_on(self, listening: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(listening, self._accept, listening)


async def listen(host: str, port: int, take: Take) -> Listener:
    """Listen at a host's addresses, `port` 0 being any; every connection goes to `take`.

    Raises:
        OSError: an address cannot be listened on.
    """
    # The loop knows how to bind to every address of a name.
    bound = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    # Named as TCP's, what comes of them is sent without Nagle's delay.
    sockets = [socket.fromfd(found.fileno(), found.family, found.type, socket.IPPROTO_TCP) for found in bound.sockets]
    bound.close()
    return Listener(sockets, take)
