"""One socket, its session, its outbox and its tasks: the only file that awaits a socket. Knows no models.

Three kinds of tasks: one reads, one writes what the socket does not take at once, and one per open id does what a message
handler spawned. The reader never waits for a generation, so a cancel is read in every state.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from websockets.asyncio.server import ServerConnection, broadcast
from websockets.exceptions import ConnectionClosed

from wsserver import protocol
from wsserver.outbox import Outbox, OutboxFull
from wsserver.protocol import ClientMessage, CloseCode, Generate, Goaway, Init, Refusal, ServerMessage
from wsserver.session import Session, StopReason, TooManyBadMessages

log = logging.getLogger(__name__)

# Seconds to send what is unread before a close, and again for the closing handshake; a peer that takes longer is cut off.
CLOSE_TIMEOUT = 2.0
# Unread frames at which the reader waits for the writer: a client that asks faster than it reads waits for itself. Tokens
# merge, so a few hundred unread answers stay under this, and a cancel behind them is still read.
MAX_UNREAD_FRAMES = 1024

# What handles one client message: it decides and spawns, and never waits.
Dispatch = Callable[[ClientMessage, "Connection"], None]


class Connection:
    """One client."""

    def __init__(self, socket: ServerConnection, session: Session, outbox: Outbox, dispatch: Dispatch) -> None:
        self.session = session
        self._socket = socket
        self._outbox = outbox
        self._dispatch = dispatch
        self._tasks: set[asyncio.Task[None]] = set()
        # What would stop each open id just now; every task that serves an id keeps its entry up to date.
        self._stops: dict[str, Callable[[], object]] = {}
        self._writer: asyncio.Task[None]
        self._closer: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._all_written = asyncio.Event()

    async def run(self) -> None:
        """Serve the client until either side closes; what it still has running is cancelled then."""
        self._writer = asyncio.create_task(self._write())
        try:
            await self._read()
        finally:
            work = [self._writer, *self._tasks]
            for task in work:
                task.cancel()
            if self._closer:
                work.append(self._closer)  # it has an end of its own
            await asyncio.gather(*work, return_exceptions=True)

    # For message handlers.

    def send(self, frame: ServerMessage) -> None:
        """Say something about an open id, if the session still lets it out."""
        admitted = self.session.admit(frame, time.monotonic())
        if admitted is not None:
            self.reply(admitted)

    def reply(self, frame: ServerMessage) -> None:
        """Say something that is about no open id."""
        if self._closer:
            return
        try:
            self._outbox.push(frame)
        except OutboxFull:
            log.warning("session %s: closing, the reader is too slow", self.session.id)
            self._close_within(0, CloseCode.READER_TOO_SLOW, "reader too slow")
            return
        # While the socket takes all it is given, no frame waits for the writer's turn. When it does not, the writer waits.
        while not self._socket.transport.get_write_buffer_size() and (data := self._outbox.pop()) is not None:
            broadcast((self._socket,), data, text=True)
        if self._outbox:
            self._all_written.clear()
            self._news.set()

    def spawn(self, message: Init | Generate, serve: Callable[[str], Coroutine[None, None, None]]) -> None:
        """Open a message's id and serve it in a task of its own.

        Raises:
            Refusal: the session does not let the message in.
        """
        id = self.session.open(message)
        task = asyncio.create_task(self._serve(id, serve))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_stop(self, id: str, stop: Callable[[], object]) -> None:
        """Say what would stop an open id from now on; called at once if the stop has been read already."""
        self._stops[id] = stop
        if self.session.is_stopping(id):
            stop()

    def stop(self, ids: list[str]) -> None:
        """Stop ids that the session has marked as stopping."""
        for id in ids:
            self._outbox.drop_tokens(id)
            if stop := self._stops.get(id):
                stop()

    # For the server.

    def go_away(self, deadline: float) -> None:
        """Tell the client that the server stops in `deadline` seconds."""
        self.reply(Goaway(deadline_ms=round(deadline * 1000)))

    def stop_all(self, reason: StopReason) -> None:
        """Stop what still runs. What was made so far is not dropped: nobody asked to forget it."""
        for id in self.session.stop(self.session.active, reason, time.monotonic()):
            if stop := self._stops.get(id):
                stop()

    async def idle(self) -> None:
        """Wait until no id is open."""
        while self._tasks:
            await asyncio.wait(self._tasks)

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
                    self._receive(data)
                if len(self._outbox) > MAX_UNREAD_FRAMES and not self._writer.done():
                    await self._all_written.wait()
        except ConnectionClosed:
            pass  # the usual end of many clients: a tab closed, a network gone

    def _receive(self, text: str) -> None:
        try:
            try:
                message = protocol.decode(text)
                self.session.understood()
                self._dispatch(message, self)
            except Refusal as refusal:
                self.reply(self.session.answer(refusal))
        except TooManyBadMessages:
            self.close(CloseCode.TOO_MANY_BAD_MESSAGES, "too many bad messages")

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
        finally:
            self._all_written.set()

    def _close_within(self, seconds: float, code: CloseCode, reason: str) -> None:
        for task in self._tasks:
            task.cancel()
        self._closer = asyncio.create_task(self._close(seconds, code, reason))

    async def _close(self, seconds: float, code: CloseCode, reason: str) -> None:
        """Close after at most `seconds` for what is unread: the writer may be waiting for a client that takes nothing."""
        try:
            async with asyncio.timeout(seconds):
                if self._outbox:
                    await self._all_written.wait()
        except TimeoutError:
            log.debug("session %s: closing with %d frames unread", self.session.id, len(self._outbox))
        self._writer.cancel()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._socket.close(code, reason)
        except TimeoutError:
            self.abort()

    # The ids.

    async def _serve(self, id: str, serve: Callable[[str], Coroutine[None, None, None]]) -> None:
        try:
            await serve(id)
        except asyncio.CancelledError:
            raise
        except BaseException:  # a panic in Rust code, of the tokenizer or of JSON, is no Exception
            log.exception("session %s: serving a request failed", self.session.id)
        finally:
            self._stops.pop(id, None)
        # From the frame that ends an id to here nothing awaits, so no later request can have opened the id anew.
        if id in self.session.active:
            # Only after the exception logged above: every open id gets its one end, whatever happened.
            self.send(self.session.failure(id, "internal", "the server failed to serve this request; its log says why"))
