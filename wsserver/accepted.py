"""One client's connection: the library's, with bounds that the library has not. Knows no messages and no sessions."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from websockets.asyncio.server import Server, ServerConnection
from websockets.http11 import Request
from websockets.protocol import Event
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from wsserver import tcp
from wsserver.config import Config
from wsserver.limits import BURST_SECONDS, FRAMES_PER_MESSAGE, LONG_MESSAGE, Accounts, Owner, TokenBucket
from wsserver.liveness import ping_interval
from wsserver.protocol import SUBPROTOCOL, CloseCode
from wsserver.reading import Reading

WRITE_LIMIT = 2_048  # how much may lie in this process behind the outbox
UNREAD_MESSAGES = 4  # how many messages may wait for a reader that waits for its own unread answers
# Where the system does not tell what a peer takes, a pong must come within so many seconds.
PONG_WITHIN = 20.0
# Frames that may be sent beside those of as many messages as may be: whoever sends too many messages is told so first.
SPARE_FRAMES = 100
# Bytes that are parsed before the frames in them are counted; more of them inside a frame that is long already, for which
# pieces that small would cost more than all else.
PIECE = 512
LONG_PIECE = 4_096
# Seconds that a client is given to read why it is cut off.
LINGER = 2.0


class Accepted(ServerConnection):
    """The connection of a client that was let in, and is about to say what it wants."""

    def __init__(self, server: Server, config: Config, accounts: Accounts, reading: Reading, address: Owner) -> None:
        super().__init__(
            _Protocol(max_size=config.max_message_bytes),
            server,
            ping_interval=ping_interval(config.stall_timeout),
            ping_timeout=None if tcp.TELLS_TRAFFIC else PONG_WITHIN,
            max_queue=UNREAD_MESSAGES,
            write_limit=WRITE_LIMIT,
        )
        self.address = address
        self.reading = reading
        self._accounts = accounts
        self._account = accounts.of(address)
        self._is_cut_off = False
        self._unparsed = bytearray()
        self._in_line = False
        self._resting: asyncio.TimerHandle | None = None
        self._frame_count = 0
        self._since_frame = 0  # bytes that were parsed since the last frame ended
        rate = FRAMES_PER_MESSAGE * config.messages_per_second
        self._frames = TokenBucket(rate, BURST_SECONDS * rate + SPARE_FRAMES)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        super().connection_made(transport)
        # The library's queue of messages was full, and is not any more.
        self.recv_messages.resume = partial(self.loop.call_soon, self._join)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let it out, with nothing left that only a full collection would find: that stops all streams for a while."""
        self._accounts.leave(self.address)
        if self._resting:
            self._resting.cancel()
        super().connection_lost(exc)
        self.recv_messages.resume = self.transport.resume_reading
        for error in (self.protocol.parser_exc, self.protocol.handshake_exc):
            _forget_frames(error)

    def data_received(self, data: bytes) -> None:
        """Take what a read gave."""
        self._unparsed += data
        self._join()
        if self._unparsed:  # others are before it, and what is left must not grow meanwhile
            self.transport.pause_reading()

    def parse(self) -> int:
        """Parse some of what was read; give how many frames were in it, a long one for as many as it is long."""
        before = self._frame_count
        if self._may_parse:
            size = min(max(self._since_frame, PIECE), LONG_PIECE)
            piece = bytes(self._unparsed[:size])
            del self._unparsed[:size]
            self._since_frame += size
            super().data_received(piece)
        return self._frame_count - before

    def goes_on(self) -> bool:
        """Whether it has more to be parsed now. Nothing is read while something is left."""
        if self._is_cut_off or self.transport.is_closing():
            self._unparsed.clear()
        elif self._unparsed:
            self.transport.pause_reading()
        elif not self.recv_messages.paused:
            self.transport.resume_reading()
        self._rest()
        self._in_line = self._may_parse and not self._resting
        return self._in_line

    def _rest(self) -> None:
        """Parse no more of a client that owes frames until as many could have been sent."""
        wait = self._account.frames.wait(time.monotonic())
        if wait and not self._resting:
            self._resting = self.loop.call_later(wait, self._rested)

    def _rested(self) -> None:
        self._resting = None
        # Also with nothing to be parsed: reading may have stopped for a queue that was full, and only a turn resumes it.
        if not self.transport.is_closing():
            self._join()

    @property
    def _may_parse(self) -> bool:
        return bool(self._unparsed) and not (self._is_cut_off or self.transport.is_closing() or self.recv_messages.paused)

    def _join(self) -> None:
        if not (self._in_line or self._resting):
            self._in_line = True
            self.reading.join(self)

    def process_event(self, event: Event) -> None:
        """Count a frame; one too many ends the connection here and now, and what is still to be read is not."""
        self._frame_count += 1 + self._since_frame // LONG_MESSAGE
        self._since_frame = 0
        now = time.monotonic()
        # A debt: all of a client's connections together are parsed no faster, and none is let in until it is paid.
        self._account.frames.spend(1, now)
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


def _forget_frames(error: BaseException | None) -> None:
    while error:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class _Protocol(ServerProtocol):
    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        """Serve also clients that offer no subprotocol, or only others."""
        return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in subprotocols else None
