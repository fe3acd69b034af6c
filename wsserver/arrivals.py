"""TCP connections that have not said yet what they want: let in or turned away, and then waited for.

The library's connection, with its task and its timer, is made once a whole request is there. Until then one costs next to
nothing, so whoever opens many, or speaks byte by byte, takes no time from others. Knows no WebSocket.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from itertools import islice
from typing import cast

from wsserver.limits import Accounts, Owner, address_of

# Bytes of a request.
MAX_REQUEST_BYTES = 16_384
# How many are given up at once before others have their turn.
ENDS_PER_TURN = 32
TOO_MANY = "too many connections; try again later\n"
NO_REQUEST = "wsserver answers a GET of HTTP/1.1, and speaks WebSocket at /ws\n"
# Seconds for the end of TLS; whoever takes longer is cut off.
TLS_SHUTDOWN_TIMEOUT = 10.0


class Arrivals:
    """All who have not said yet what they want, for which they have `patience` seconds, that of TLS included.

    `admit` makes the protocol that talks to one who has said it, and lets it out.
    """

    def __init__(
        self,
        accounts: Accounts,
        patience: float,
        admit: Callable[[Owner], asyncio.Protocol],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.admit = admit
        self.tls = tls
        self._accounts = accounts
        self._patience = patience
        self._until: dict[Arrival, float] = {}  # when its time is over, the first one first
        self._next_sweep: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self, accepted: socket.socket, peername: object) -> None:
        """Let a connection in, or answer at once, whatever it was going to ask: what is not let in holds nothing."""
        now, address = time.monotonic(), address_of(peername)
        if refusal := HTTPStatus.SERVICE_UNAVAILABLE if self._closed else self._accounts.enter(address, now):
            with accepted, contextlib.suppress(OSError):
                if not self.tls:  # where words would cost a handshake
                    accepted.send(_answer(refusal, TOO_MANY))
            return
        arrival = Arrival(self, address)
        self._until[arrival] = now + self._patience
        if self._next_sweep is None:
            self._sweep()
        arrival.connect(accepted)

    def waits(self, arrival: "Arrival") -> bool:
        """Whether it is waited for."""
        return arrival in self._until

    def admitted(self, arrival: "Arrival") -> None:
        """Wait for it no more; it stays let in."""
        del self._until[arrival]

    def leave(self, arrival: "Arrival") -> None:
        """Let it out if it is still waited for."""
        if self._until.pop(arrival, None) is not None:
            self._accounts.leave(arrival.address)

    def close(self) -> None:
        """Give up all, and let nobody in any more."""
        self._closed = True
        for arrival in list(self._until):
            arrival.give_up()

    def _sweep(self) -> None:
        """Give up those whose time is over, a few at a time: they may have come all at once."""
        now = time.monotonic()
        for arrival, until in list(islice(self._until.items(), ENDS_PER_TURN)):
            if until <= now:
                arrival.give_up()
        self._next_sweep = None
        if self._until:
            wait = max(next(iter(self._until.values())) - now, 0.0)
            self._next_sweep = asyncio.get_running_loop().call_later(wait, self._sweep)


class Arrival(asyncio.Protocol):
    """One of them."""

    __slots__ = ("_arrivals", "_connecting", "_said", "_transport", "address")

    def __init__(self, arrivals: Arrivals, address: Owner) -> None:
        self.address = address
        self._arrivals = arrivals
        self._said = bytearray()
        self._connecting: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connect(self, accepted: socket.socket) -> None:
        """Begin to listen to it, after a handshake of TLS where that is spoken."""
        self._connecting = asyncio.create_task(self._connect(accepted))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take what it speaks through."""
        self._transport, self._connecting = cast(asyncio.Transport, transport), None

    def data_received(self, data: bytes) -> None:
        """Take what a read gave."""
        if self._transport is None or not self._arrivals.waits(self):
            return
        self._said += data
        line, newline, _ = self._said.partition(b"\n")
        if newline and (problem := _problem(bytes(line))):
            self._transport.write(_answer(problem, NO_REQUEST))
            self._transport.close()
            self._arrivals.leave(self)
        elif self._said.find(b"\r\n\r\n", 0, MAX_REQUEST_BYTES) >= 0:
            self._arrivals.admitted(self)
            protocol = self._arrivals.admit(self.address)
            self._transport.set_protocol(protocol)
            protocol.connection_made(self._transport)
            protocol.data_received(bytes(self._said))
        elif len(self._said) > MAX_REQUEST_BYTES:
            self.give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let it out."""
        self._arrivals.leave(self)

    def give_up(self) -> None:
        """Cut it off."""
        self._arrivals.leave(self)
        if self._transport:
            self._transport.abort()
        elif self._connecting:
            self._connecting.cancel()

    async def _connect(self, accepted: socket.socket) -> None:
        loop, tls = asyncio.get_running_loop(), self._arrivals.tls
        shutdown = TLS_SHUTDOWN_TIMEOUT if tls else None
        try:
            with contextlib.suppress(OSError):  # it has gone; or whatever it speaks, it is no TLS
                await loop.connect_accepted_socket(lambda: self, accepted, ssl=tls, ssl_shutdown_timeout=shutdown)
        finally:
            if self._connecting:
                self._connecting = None
                self._arrivals.leave(self)


def _problem(line: bytes) -> HTTPStatus | None:
    """Give the status of a request whose first line is none that the library would answer."""
    if not line.endswith(b" HTTP/1.1\r"):
        return HTTPStatus.BAD_REQUEST
    return None if line.startswith(b"GET ") else HTTPStatus.METHOD_NOT_ALLOWED


def _answer(status: HTTPStatus, why: str) -> bytes:
    more = {HTTPStatus.BAD_REQUEST: "", HTTPStatus.METHOD_NOT_ALLOWED: "Allow: GET\r\n"}.get(status, "Retry-After: 1\r\n")
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\n{more}"
        f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(why)}\r\n\r\n{why}"
    ).encode()
