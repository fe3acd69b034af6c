"""How a client gets its connection, and gets it back: whom it dials, how long it waits in between, and when it gives up."""

import asyncio
import random
import time
from collections.abc import Callable

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from wsserver import __version__
from wsserver.client.messages import ConnectionLost, ServerError
from wsserver.protocol import SUBPROTOCOL, CloseCode

URL = "ws://127.0.0.1:41443/ws"

# The longest first wait between two dials, and the longest of all; each is drawn, so that not all clients come at once.
FIRST_DELAY = 0.25
LONGEST_DELAY = 10.0
# What a client waits at least that was told to come back after a minute.
RATE_DELAY = 60.0
# Seconds after which a server counts as gone that answers no ping, and that closes with no word.
PING_INTERVAL, PING_TIMEOUT, CLOSE_TIMEOUT = 10.0, 20.0, 2.0

# What would come out the same again.
FOR_GOOD = {
    CloseCode.NORMAL,
    CloseCode.UNSUPPORTED_DATA,
    CloseCode.INVALID_TEXT,
    CloseCode.MESSAGE_TOO_BIG,
    CloseCode.TOO_MANY_BAD_MESSAGES,
}
# What is an error by name, as a close code or as the status of the handshake.
BY_NAME = {
    CloseCode.NOT_AUTHENTICATED: "unauthenticated",
    CloseCode.FORBIDDEN: "forbidden",
    401: "unauthenticated",
    403: "forbidden",
}


class Backoff:
    """The waits of one client that has lost its connection: longer each time, until it is answered or gives up. Pure."""

    def __init__(self, patience: float, draw: Callable[[float, float], float] = random.uniform) -> None:
        self._patience = patience
        self._draw = draw
        self._longest = FIRST_DELAY
        self._lost_at: float | None = None

    def answered(self) -> None:
        """Be told that there is a server that answers."""
        self._longest, self._lost_at = FIRST_DELAY, None

    def wait(self, now: float) -> float | None:
        """Give the seconds to the next dial; None if it has been tried for long enough."""
        if self._lost_at is None:
            self._lost_at = now
        elif now - self._lost_at >= self._patience:
            return None
        longest, self._longest = self._longest, min(2 * self._longest, LONGEST_DELAY)
        return self._draw(0, longest)


class Dialer:
    """Connects to one server, again and again."""

    def __init__(self, url: str, key: str | None, patience: float) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._backoff = Backoff(patience)

    async def dial(self) -> ClientConnection:
        """Connect.

        Raises:
            ServerError: the server does not let this client in.
            OSError: nobody is there, or, as `ConnectionLost`, nobody who speaks this protocol.
        """
        try:
            return await connect(
                self._url,
                additional_headers=self._headers,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                user_agent_header=f"wsserver/{__version__}",
                compression=None,
                max_size=None,  # a whole answer may come in one frame
                ping_interval=PING_INTERVAL,
                ping_timeout=PING_TIMEOUT,
                close_timeout=CLOSE_TIMEOUT,
            )
        except InvalidStatus as error:
            status, said = error.response.status_code, error.response.body.decode(errors="replace").strip()
            if code := BY_NAME.get(status):
                raise ServerError(code, said or f"the server answered {status}") from error
            raise ConnectionLost(f"{self._url} answers {status}: {said}") from error
        except WebSocketException as error:
            raise ConnectionLost(f"{self._url}: {error}") from error

    async def redial(self, lost: ClientConnection) -> ClientConnection:
        """Connect anew after a connection was lost, once that has come back; waits longer each time.

        Raises:
            ServerError: the server does not let this client in any more.
            ConnectionLost: it was closed for a reason that will not pass, or has not come back for too long.
        """
        code, reason = lost.close_code, lost.close_reason or ""
        if name := BY_NAME.get(code or 0):
            raise ServerError(name, reason)
        if code in FOR_GOOD:
            raise ConnectionLost(f"the server closed the connection with {code} ({reason})", code)
        await _pass(RATE_DELAY if code == CloseCode.RATE_LIMITED else 0)
        while (seconds := self._backoff.wait(time.monotonic())) is not None:
            await _pass(seconds)
            try:
                return await self.dial()
            except OSError as error:
                reason = str(error)
        raise ConnectionLost(f"the connection was lost and does not come back: {reason}", code)

    def answered(self) -> None:
        """Be told that the server has said something."""
        self._backoff.answered()


async def _pass(seconds: float) -> None:
    """Let time pass: that is all that is waited for here."""
    passed = asyncio.Event()  # no future, which a cancel in the very turn in which the time is over would have ended
    timer = asyncio.get_running_loop().call_later(seconds, passed.set)
    try:
        await passed.wait()
    finally:
        timer.cancel()
