"""A client's connection that comes back when it is lost, and what was asked for over it and has not been answered yet.

Says things at once or not at all: what a lost connection took with it, the next one says anew.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.connection import broadcast
from websockets.exceptions import ConnectionClosed

from wsserver.client.asked import Asked, Generation, Load
from wsserver.client.dialing import Dialer
from wsserver.client.messages import ConnectionLost, Failure, ServerError, decode, encode
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
        self._places = itertools.count()
        # What may say, oldest first, which model the next answer comes from: the last load that got ready, and those asked
        # for after it that have not failed.
        self._loads: list[Load] = []
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
        asked.place = next(self._places)
        if isinstance(asked, Load):
            self._loads.append(asked)
        elif isinstance(asked, Generation):
            asked.load = self._newest_load
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
            self.cancel(asked)

    # The connection.

    @property
    def _newest_load(self) -> Load | None:
        return self._loads[-1] if self._loads else None

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
        waiting = [asked for asked in self._asked.values() if isinstance(asked, Generation) and not asked.started]
        loads = [asked.load for asked in waiting if asked.load and not asked.load.error]
        # In the order of asking, each is said behind what chose its model, which may not be what chooses the next one's.
        for asked in sorted({*self._asked.values(), *loads, *self._loads}, key=lambda asked: asked.place):
            self._say(asked.opening())
            if asked.id in self._asked:
                self._settle(asked)
        self._say([STATUS for report in self._reports])
        # Whose answer tells that there is a server behind that connection, even if nothing else is waited for.
        self._ask_status().add_done_callback(asyncio.Future.exception)  # heard by nobody else

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
            self._answer(asked, asked.receive(frame))
            self._settle(asked)
        elif isinstance(frame, Failure) and frame.code != "not_active" and frame.id in [load.id for load in self._loads]:
            # It was ready on an earlier connection. What is asked for from now on would get another model's answer.
            raise frame.as_error()

    def _answer(self, asked: Asked, messages: Sequence[bytes]) -> None:
        """Say something to what was heard: only one that the server has forgotten wants that, to be asked for anew."""
        if messages and isinstance(asked, Generation) and asked.load is not self._newest_load:
            asked.fail(ServerError("resume_expired", "the server has forgotten it, and another model was chosen since"))
        else:
            self._say(messages)

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
        if isinstance(asked, Load) and asked in self._loads:
            place = self._loads.index(asked)
            del self._loads[slice(0, place) if asked.ready else slice(place, place + 1)]

    def _end(self, error: Exception) -> None:
        """End everything, unless it has ended."""
        if self._error:
            return
        self._error = error
        for asked in list(self._asked.values()):
            asked.fail(error)
            self._settle(asked)
        while self._reports:
            self._answer_status(error)
        self._enter("closed")

    def _enter(self, state: State) -> None:
        self.state = state
        self.loop.call_soon(self._on_state, state)
