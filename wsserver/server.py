"""Listens, accepts, answers plain HTTP GETs, and drains when it is told to stop. Knows no messages and no models."""

import asyncio
import http
import logging
import secrets
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from websockets.asyncio.server import Server as WebSocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from wsserver import __version__
from wsserver.config import Config
from wsserver.connection import CLOSE_TIMEOUT, Connection, Dispatch
from wsserver.outbox import Outbox
from wsserver.protocol import MAX_MESSAGE_BYTES, SUBPROTOCOL, CloseCode
from wsserver.session import ServerState, Session

log = logging.getLogger(__name__)

# How much may lie in the kernel unsent. The rest waits in the outbox, where it merges and a cancel can drop it.
UNSENT_BYTES = 16_384
WRITE_LIMIT = 2_048  # and how much in this process behind the outbox
# Seconds after which a peer that takes nothing is given up; the library's own keepalive waits behind what is unsent.
VANISHED_AFTER = 30.0
STOP_GRACE = 5.0  # seconds that stopped generations get to say so, when the server ends

INDEX = "wsserver speaks WebSocket at /ws; protocol.md describes the messages. GET /healthz says whether it is up.\n"


class Server:
    """The listening server, an async context manager; leaving it closes what is left without further notice."""

    def __init__(self, config: Config, dispatch: Dispatch) -> None:
        self.state = ServerState(started_at=time.monotonic(), max_active=config.max_active)
        self._config = config
        self._dispatch = dispatch
        self._connections: set[Connection] = set()
        self._listener: WebSocketServer

    async def __aenter__(self) -> Self:
        self._listener = await serve(
            self._accept,
            self._config.host,
            self._config.port,
            process_request=_answer_get,
            select_subprotocol=_select_subprotocol,
            compression=None,
            max_size=MAX_MESSAGE_BYTES,
            write_limit=WRITE_LIMIT,
            server_header=f"wsserver/{__version__}",
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._listener.wait_closed()
        except TimeoutError:
            # A client that does not read holds up the library's close for ever.
            for connection in self._connections:
                connection.abort()
            await self._listener.wait_closed()

    @property
    def port(self) -> int:
        """The port it listens on."""
        port: int = next(iter(self._listener.sockets)).getsockname()[1]
        return port

    async def drain(self) -> None:
        """Stop serving: no new generations, running ones may finish until the drain timeout, then every client is closed."""
        self.state.draining = True
        connections = list(self._connections)
        for connection in connections:
            connection.go_away(self._config.drain_timeout)
        await _within(self._config.drain_timeout, [asyncio.create_task(c.idle()) for c in connections])
        connections = list(self._connections)
        for connection in connections:
            connection.stop_all("shutdown")
        await _within(STOP_GRACE, [asyncio.create_task(c.idle()) for c in connections])
        connections = list(self._connections)
        for connection in connections:
            connection.close(CloseCode.SERVICE_RESTART, "the server is stopping; connect again in a moment")
        await _within(2 * CLOSE_TIMEOUT + 1, [asyncio.create_task(c.closed()) for c in connections])

    async def _accept(self, client: ServerConnection) -> None:
        _set_options(client)
        session = Session(id=secrets.token_urlsafe(9), server=self.state)
        connection = Connection(client, session, Outbox(), self._dispatch)
        self._connections.add(connection)
        if self.state.draining:
            connection.go_away(self._config.drain_timeout)
        log.debug("session %s: opened", session.id)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            log.debug("session %s: closed with %s", session.id, client.close_code)


def _answer_get(client: ServerConnection, request: Request) -> Response | None:
    match request.path.partition("?")[0]:
        case "/ws":
            return None  # the handshake goes on, or the library answers 426
        case "/healthz":
            return client.respond(http.HTTPStatus.OK, "ok\n")
        case "/":
            return client.respond(http.HTTPStatus.OK, INDEX)
        case _:
            return client.respond(http.HTTPStatus.NOT_FOUND, INDEX)


def _select_subprotocol(client: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    # Given a function, the library also serves clients that offer no subprotocol, or only others.
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offered else None


def _set_options(client: ServerConnection) -> None:
    accepted: socket.socket = client.transport.get_extra_info("socket")
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(VANISHED_AFTER * 1000))


async def _within(seconds: float, tasks: list[asyncio.Task[None]]) -> None:
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=seconds)
        for task in late:
            task.cancel()
