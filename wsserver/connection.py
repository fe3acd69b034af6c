"""One socket, its outbox and its tasks: the only file that awaits a socket. Knows no jobs and no models.

Two tasks: one reads, one writes what the socket does not take at once. The reader never waits for a generation, so a cancel
is read in every state.
"""

import asyncio
import logging

from websockets.asyncio.server import broadcast
from websockets.exceptions import ConnectionClosed

from wsserver import tcp
from wsserver.accepted import Accepted
from wsserver.liveness import Liveness
from wsserver.outbox import Outbox, OutboxFull
from wsserver.peer import Dispatch, Peer, Whose
from wsserver.protocol import CloseCode, Done, Goaway, ServerMessage
from wsserver.resumables import Resumables
from wsserver.session import Session, TooManyBadMessages, TooManyMessages, TooManyWrongKeys, WrongKey

log = logging.getLogger(__name__)

# Seconds to send what is unread before a close, and again for the closing handshake; a peer that takes longer is cut off.
CLOSE_TIMEOUT = 2.0
# Unread frames at which the reader waits for the writer: a client that asks faster than it reads waits for itself. Tokens
# merge, so a few hundred unread answers stay under this, and a cancel behind them is still read.
MAX_UNREAD_FRAMES = 1024

# The most text that a client that resumes is sent in one frame.
MAX_REPLAY_BYTES = 65_536


class Connection:
    """One client's socket; the link of its peer."""

    def __init__(
        self,
        socket: Accepted,
        session: Session,
        outbox: Outbox,
        resumables: Resumables,
        dispatch: Dispatch,
        whose: Whose,
    ) -> None:
        self.peer = Peer(session, self, resumables)
        # Whether it is closed once a done was sent.
        self.once = False
        self._leaver: asyncio.Task[None] | None = None
        self._socket = socket
        # Two such frames may be there at once, one in the outbox and one behind it.
        self.replay_bytes = min(outbox.max_bytes // 4, MAX_REPLAY_BYTES)
        self._outbox = outbox
        self._dispatch = dispatch
        self._whose = whose
        self._writer: asyncio.Task[None]
        self._closer: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._all_written = asyncio.Event()
        self._all_written.set()

    async def run(self) -> None:
        """Serve the client until either side closes; what it still has running is cancelled then, or kept to be resumed."""
        self._writer = asyncio.create_task(self._write())
        late = asyncio.get_running_loop().call_later(self.peer.session.server.auth_timeout, self._see_to_key)
        try:
            await self._read()
        finally:
            late.cancel()
            self._writer.cancel()
            self.peer.leave()
            await self.peer.left()
            # These two have an end of their own.
            await asyncio.gather(self._writer, *filter(None, [self._closer, self._leaver]), return_exceptions=True)
            # They know each other, and are free at once only if one forgets the other.
            del self.peer

    # For the peer.

    def push(self, frame: ServerMessage) -> None:
        """Send a frame in its turn; a client that leaves too much unread is closed."""
        if self._closer:
            return
        try:
            self._outbox.push(frame)
        except OutboxFull:
            self.give_up("reader too slow")
            return
        # While the socket takes all it is given, no frame waits for the writer's turn. When it does not, the writer waits.
        while not self._socket.transport.get_write_buffer_size() and (data := self._outbox.pop()) is not None:
            broadcast((self._socket,), data, text=True)
        if self._outbox:
            self._all_written.clear()
            self._news.set()
        if self.once and isinstance(frame, Done) and not self._leaver:
            self._leaver = asyncio.create_task(self._leave())

    def has_room(self, frame: ServerMessage) -> bool:
        """Whether a frame may be pushed now; one that may not waits until the outbox is empty."""
        return self._closer is not None or self._outbox.has_room(frame)

    def drop_tokens(self, id: str) -> None:
        """Forget the tokens of an id that are not sent yet."""
        self._outbox.drop_tokens(id)

    async def emptied(self) -> None:
        """Wait until the outbox is empty; it is when this returns, and may not be one turn later."""
        while not self._all_written.is_set():  # also after a wait: another frame may have come before its end was noticed
            await self._all_written.wait()

    # For the server.

    def go_away(self, deadline: float) -> None:
        """Tell the client that the server stops in `deadline` seconds."""
        self.push(Goaway(deadline_ms=round(deadline * 1000)))

    def look(self, liveness: Liveness, now: float) -> None:
        """Give the peer up if it takes nothing any more, or says nothing."""
        if self._closer or self._socket.transport.is_closing():
            return
        match liveness.verdict(now, tcp.traffic(self._socket.transport)):
            case "stalled":
                self.give_up("nothing was read for too long")
            case "silent":
                self._close_within(0, CloseCode.INTERNAL_ERROR, "pings were not answered")

    def give_up(self, why: str) -> None:
        """Close because the reader is too slow: what is unread stays so."""
        log.warning("session %s: closing, the reader is too slow: %s", self.peer.session.id, why)
        self._close_within(0, CloseCode.READER_TOO_SLOW, why)

    def close(self, code: CloseCode, reason: str) -> None:
        """Stop all work, and close once what is in the outbox is sent."""
        if not self._closer:
            self._close_within(CLOSE_TIMEOUT, code, reason)

    def abort(self) -> None:
        """Cut the connection off, without a closing handshake."""
        self._socket.transport.abort()

    async def closed(self) -> None:
        """Wait until the connection is gone."""
        await self._socket.wait_closed()

    # The reader.

    async def _read(self) -> None:
        try:
            async for data in self._socket:
                if self._closer:
                    continue  # keep reading, or the closing handshake and pongs go unseen
                if isinstance(data, bytes):
                    self.close(CloseCode.UNSUPPORTED_DATA, "send JSON in text frames")
                else:
                    with self._socket.reading.computing():
                        self._receive(data)
                # Many that came at once are read without a wait; others have their turn all the same.
                await asyncio.sleep(0)
                if self._leaves_answers_unread and not self._writer.done():
                    await self._all_written.wait()
        except ConnectionClosed:
            pass  # the usual end of many clients: a tab closed, a network gone

    @property
    def _leaves_answers_unread(self) -> bool:
        return len(self._outbox) > MAX_UNREAD_FRAMES or self._outbox.answer_bytes > self._outbox.max_bytes // 2

    def _receive(self, text: str) -> None:
        try:
            self.peer.hear(text, self._dispatch, self._whose)
        except TooManyWrongKeys:
            self.close(CloseCode.RATE_LIMITED, "too many wrong keys came from this address")
        except WrongKey:
            self.close(CloseCode.NOT_AUTHENTICATED, "the key is wrong")
        except TooManyBadMessages:
            self.close(CloseCode.TOO_MANY_BAD_MESSAGES, "too many bad messages")
        except TooManyMessages:
            self.close(CloseCode.RATE_LIMITED, "too many messages in too short a time")

    def _see_to_key(self) -> None:
        if not self.peer.session.authenticated:
            self.close(CloseCode.AUTHENTICATION_TIMEOUT, "no key came in time")

    # The writer.

    async def _write(self) -> None:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while (data := self._outbox.pop()) is not None:
                    await self._socket.send(data, text=True)
                self._all_written.set()
        except ConnectionClosed:
            pass  # the reader sees it too
        except asyncio.CancelledError:
            pass  # its last act, or this error's frames would know the connection that knows the task that keeps the error
        finally:
            self._all_written.set()

    async def _leave(self) -> None:
        """Close when all is sent, however long the client reads it; one that takes nothing is given up as ever."""
        await self._all_written.wait()
        self.peer.leave()
        await self._socket.close(CloseCode.NORMAL, "the answer was sent")

    def _close_within(self, seconds: float, code: CloseCode, reason: str) -> None:
        self.peer.leave()
        self._closer = asyncio.create_task(self._close(seconds, code, reason))

    async def _close(self, seconds: float, code: CloseCode, reason: str) -> None:
        """Close after at most `seconds` for what is unread: the writer may be waiting for a client that takes nothing."""
        try:
            async with asyncio.timeout(seconds):
                await self._all_written.wait()
        except TimeoutError:
            log.debug("session %s: closing with %d frames unread", self.peer.session.id, len(self._outbox))
        self._writer.cancel()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._socket.close(code, reason)
        except TimeoutError:
            self.abort()
