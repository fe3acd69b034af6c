"""One accepted TCP connection: let in or turned away before it has said a word, its request and its frames counted.

The library's connection with bounds that the library has not. Knows no messages and no sessions.
"""

import asyncio
import time
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request
from websockets.protocol import Event

from wsserver.limits import BURST_SECONDS, FRAMES_PER_MESSAGE, Account, Accounts, Owner, TokenBucket, address_of
from wsserver.protocol import CloseCode

# Bytes of a handshake's request; the library alone would take a megabyte.
MAX_REQUEST_BYTES = 16_384
# Frames that may be sent beside those of as many messages as may be: whoever sends too many messages is told so first.
SPARE_FRAMES = 100
# Bytes that are parsed before the frames in them are counted, and frames after which others have their turn: one read may
# give many thousand.
PIECE = 512
FRAMES_PER_TURN = 8
# Seconds that a client is given to read why it is cut off.
LINGER = 2.0


class Accepted(ServerConnection):
    """A client's connection from its first moment to its last."""

    def __init__(self, accounts: Accounts, messages_per_second: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.address: Owner
        self._account: Account
        self._accounts = accounts
        self._entered = self._is_cut_off = False
        self._request_bytes = 0
        self._unparsed = bytearray()
        self._frames_of_turn = 0
        rate = FRAMES_PER_MESSAGE * messages_per_second
        self._frames = TokenBucket(rate, BURST_SECONDS * rate + SPARE_FRAMES)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in, or answer at once, whatever it was going to ask: what is not let in holds nothing."""
        self.address = address_of(transport.get_extra_info("peername"))
        if refusal := self._accounts.enter(self.address, time.monotonic()):
            writer = cast(asyncio.Transport, transport)
            writer.write(_answer(refusal))
            writer.close()
            return
        self._entered = True
        self._account = self._accounts.of(self.address)
        super().connection_made(transport)
        # The library's queue of messages was full, and is not any more.
        self.recv_messages.resume = partial(self.loop.call_soon, self._parse)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let it out."""
        if self._entered:
            self._accounts.leave(self.address)
            super().connection_lost(exc)

    def eof_received(self) -> None:
        """Hear that the client will say no more."""
        if self._entered:
            super().eof_received()

    def data_received(self, data: bytes) -> None:
        """Take what a read gave, as far as it is allowed."""
        if not self._entered:
            return
        if self.request is None:
            self._request_bytes += len(data)
            if self._request_bytes > MAX_REQUEST_BYTES:
                self.transport.abort()
                return
        self._unparsed += data
        self._parse()

    def _parse(self) -> None:
        """Parse some of what was read. Nothing more is read while something is left."""
        self._frames_of_turn = 0
        while self._unparsed and self._frames_of_turn < FRAMES_PER_TURN and not self.recv_messages.paused:
            if self._is_cut_off or self.transport.is_closing():
                break
            piece = bytes(self._unparsed[:PIECE])
            del self._unparsed[:PIECE]
            super().data_received(piece)
        if self._is_cut_off or self.transport.is_closing():
            self._unparsed.clear()
        elif self._unparsed:
            self.transport.pause_reading()
            if not self.recv_messages.paused:
                self.loop.call_soon(self._parse)
        elif not self.recv_messages.paused:
            self.transport.resume_reading()

    def process_event(self, event: Event) -> None:
        """Count a frame; one too many ends the connection here and now, and what is still to be read is not."""
        self._frames_of_turn += 1
        now = time.monotonic()
        self._account.frames.take(now)  # of none that are left no new connection is let in
        if not isinstance(event, Request) and self._frames.take(now):
            self._cut_off()
        else:
            super().process_event(event)

    def _cut_off(self) -> None:
        if self._is_cut_off:
            return
        self._is_cut_off = True
        self.protocol.fail(CloseCode.RATE_LIMITED, "too many frames in too short a time")
        self.send_data()
        self.transport.pause_reading()
        self.loop.call_later(LINGER, self.transport.abort)


def _answer(status: HTTPStatus) -> bytes:
    why = "too many connections; try again later\n"
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nRetry-After: 1\r\n"
        f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(why)}\r\n\r\n{why}"
    ).encode()
