"""A client's connection that comes back when it is lost, and what was asked for over it and has not been answered yet.

Says things at once or not at all: what a lost connection took with it, the next one says anew.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.connection import broadcast
from websockets.exceptions import ConnectionClosed

from wsserver.client.asked import Asked, Load
from wsserver.client.dialing import Dialer
from wsserver.client.messages import ConnectionLost, Failure, decode, encode
from wsserver.protocol import Goaway, StatusReport

State = Literal["connected", "reconnecting", "closed"]

STATUS = encode({"type": "status"})


class LastingConnection:
    """One connection after the other. What ends them for good is raised by all who wait, and all who ask later."""

    def __init__(self, dialer: Dialer, on_state: Callable[[State], object]) -> None:
        self.state: State = "closed"
        self.loop: asyncio.AbstractEventLoop
        self._dialer = dialer
        self._on_state = on_state
        self._asked: dict[str, Asked] = {}  # by id, oldest first
        self._news: dict[str, asyncio.Event] = {}
        self._reports: deque[asyncio.Future[StatusReport]] = deque()  # oldest first, as they are answered
        # The init that led to the model which this connection uses: a new one has to be told.
        self._chosen: Load | None = None
        self._error: Exception | None = ConnectionLost("not connected; use `async with connect(url) as server`")
        self._socket: ClientConnection
        self._running: asyncio.Task[None]

    async def open(self) -> None:
        """Connect for the first time.

        Raises:
            ServerError, OSError: as `Dialer.dial`.
        """
        self._socket = await self._dialer.dial()
        self.loop, self._error = asyncio.get_running_loop(), None
        self._running = asyncio.create_task(self._run())
        self._enter("connected")

    async def close(self) -> None:
        """Cancel what has not ended, and close."""
        self.cancel_all()
        self._end(ConnectionLost("this client was closed"))
        await self._socket.close()  # while what still comes is read, or the closing would not be seen
        self._running.cancel()
        await asyncio.wait([self._running])

    # For whoever asks.

    def ask(self, asked: Asked) -> None:
        """Ask for something.

        Raises:
            ServerError, ConnectionLost: the connection has ended for good.
        """
        if self._error:
            raise self._error
        self._asked[asked.id], self._news[asked.id] = asked, asyncio.Event()
        self._say(asked.opening())

    async def news(self, asked: Asked) -> None:
        """Wait until something of it is unread, or it has ended."""
        while not asked.unread and not asked.ended:
            news = self._news[asked.id]
            news.clear()
            await news.wait()

    async def status(self) -> StatusReport:
        """Ask what the server is doing.

        Raises:
            ServerError, ConnectionLost: the connection has ended for good.
        """
        if self._error:
            raise self._error
        return await self._ask_status()

    def cancel(self, asked: Asked) -> None:
        """Want no more of something, whether it was asked for already or will be."""
        said = asked.cancel()
        if asked.id in self._asked:
            self._say(said)

    def cancel_all(self) -> None:
        """Want no more of anything."""
        for asked in self._asked.values():
            if asked is not self._chosen:
                self.cancel(asked)

    # The connection.

    async def _run(self) -> None:
        try:
            await self._read()
            while not self._error:
                self._enter("reconnecting")
                self._socket = await self._dialer.redial(self._socket)
                self._reopen()
                self._enter("connected")
                await self._read()
        except Exception as error:  # whatever it is, those who wait get to know it
            self._end(error)

    async def _read(self) -> None:
        try:
            async for data in self._socket:
                self._dialer.answered()
                self._receive(data)
        except ConnectionClosed:
            pass  # without a handshake, or with a code that the dialer knows

    def _reopen(self) -> None:
        """Say on a new connection what still holds of what was said on those before."""
        if self._chosen:
            chosen = self._chosen
            self._asked, self._news[chosen.id] = {chosen.id: chosen} | self._asked, asyncio.Event()
        for asked in list(self._asked.values()):
            self._say(asked.opening())
            self._settle(asked)
        self._say([STATUS for report in self._reports])
        # Whose answer tells that there is a server behind that connection, even if nothing else is waited for.
        self._ask_status()

    def _ask_status(self) -> "asyncio.Future[StatusReport]":
        report: asyncio.Future[StatusReport] = asyncio.get_running_loop().create_future()
        self._reports.append(report)
        self._say([STATUS])
        return report

    def _say(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            broadcast((self._socket,), message, text=True)

    def _receive(self, data: str | bytes) -> None:
        frame = decode(data)
        if frame is None or isinstance(frame, Goaway):
            return  # what runs may finish, and then the server closes
        if isinstance(frame, StatusReport):
            self._answer_status(frame)
        elif frame.id is None:
            assert isinstance(frame, Failure)
            self._answer_status(frame.as_error())
        elif asked := self._asked.get(frame.id):
            self._say(asked.receive(frame))
            self._settle(asked)

    def _answer_status(self, answer: StatusReport | Exception) -> None:
        report = self._reports.popleft() if self._reports else None
        if report is None or report.done():
            return  # nobody waits for it any more
        if isinstance(answer, Exception):
            report.set_exception(answer)
        else:
            report.set_result(answer)

    def _settle(self, asked: Asked) -> None:
        """Wake who waits for something, and let go of it if it has ended."""
        self._news[asked.id].set()
        if not asked.ended:
            return
        del self._asked[asked.id], self._news[asked.id]
        if asked is self._chosen and asked.error:
            raise asked.error  # or what is asked for from now on would get another model's answer
        if isinstance(asked, Load) and asked.ready:
            self._chosen = asked

    def _end(self, error: Exception) -> None:
        """End everything, unless it has ended."""
        if self._error:
            return
        self._error = error
        self._chosen = None
        for asked in list(self._asked.values()):
            asked.fail(error)
            self._settle(asked)
        while self._reports:
            self._answer_status(error)
        self._enter("closed")

    def _enter(self, state: State) -> None:
        self.state = state
        self.loop.call_soon(self._on_state, state)
