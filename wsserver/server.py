"""Listens, accepts, answers plain HTTP GETs, and drains when it is told to stop. Knows no messages and no models."""

import asyncio
import contextlib
import http
import logging
import math
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Protocol, Self, cast

from websockets.asyncio.server import Server as WebSocketServer
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from wsserver import __version__, tcp
from wsserver.accepted import Accepted
from wsserver.arrivals import Arrivals
from wsserver.auth import Keys
from wsserver.config import Config
from wsserver.connection import CLOSE_TIMEOUT, Connection
from wsserver.door import Denied, Door
from wsserver.limits import Owner, address_of
from wsserver.listener import listen
from wsserver.liveness import Liveness
from wsserver.outbox import Outbox
from wsserver.pages import load_pages
from wsserver.peer import Dispatch, Peer
from wsserver.protocol import CloseCode
from wsserver.reading import Reading
from wsserver.resumables import Resumables
from wsserver.session import ServerState, Session

log = logging.getLogger(__name__)

LOOKS = 30  # how often a connection is looked at in the time after which it counts as stalled
WS_PATH = "/ws"
ECHO_PATH = "/echo"  # for tests of the protocol under ours, and only where the operator has asked for it
ONCE = "once=1"  # said behind the path by a client that cannot tell by itself when to leave
CLOSING = 5.0  # seconds of a drain that are left for stops and closes when the rest is over
STOP_GRACE = 5.0  # seconds that stopped generations get to say so, when the server ends

TOO_MANY_HANDSHAKES = "too many WebSockets were opened from this address, or too much was sent over them; try again later"
USAGE = (
    "wsserver speaks WebSocket at /ws; protocol.md describes the messages. "
    "GET /healthz says whether it is up, GET /readyz whether it can serve.\n"
)


class Client(Protocol):
    """A client as a drain sees it, whatever it speaks through."""

    peer: Peer

    def go_away(self, deadline: float) -> None:
        """Tell it that the server stops in `deadline` seconds."""
        ...

    def close(self, code: CloseCode, reason: str) -> None:
        """Stop all its work, and let it go once it was told everything."""
        ...

    async def closed(self) -> None:
        """Wait until it is gone."""
        ...


class Server:
    """The listening server, an async context manager; leaving it closes what is left without further notice."""

    def __init__(
        self,
        config: Config,
        dispatch: Dispatch,
        problem: Callable[[], str | None] = lambda: None,
        keys: Keys | None = None,
        tls: ssl.SSLContext | None = None,
        giving_way: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        keys = keys or Keys({})
        self.state = ServerState(
            time.monotonic(),
            config.max_active,
            config.request_timeout,
            config=config,
            needs_key=keys.required,
            auth_timeout=config.auth_timeout,
        )
        self.resumables = Resumables(config.resume_window, config.max_resume_bytes, config.max_detached_tokens)
        self._config = config
        self._dispatch = dispatch
        # What keeps it from serving, in words; None if nothing does.
        self._problem = problem
        self._door = Door(config, keys)
        self.tls = tls
        self._arrivals = Arrivals(self.state.accounts, config.handshake_timeout, self._admit, tls)
        self._reading = Reading(giving_way)
        self._pages = load_pages() if config.page else {}
        self._connections: dict[Connection, Liveness] = {}
        # Clients that came another way than by this listener.
        self.guests: set[Client] = set()
        self._listener: WebSocketServer
        self._next_look: asyncio.TimerHandle
        self._finish_by = 0.0  # when what runs has to have ended, once it drains

    async def __aenter__(self) -> Self:
        self._listener = serve(
            self._accept,
            process_request=self._answer,
            open_timeout=self._config.handshake_timeout,
            server_header=f"wsserver/{__version__}",
        )
        # What is the library's begins with a request.
        self._listener.create_server = self._listen
        await self._listener
        self._look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._next_look.cancel()
        self._arrivals.close()
        self._listener.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._listener.wait_closed()
        except TimeoutError:
            # A client that does not read holds up the library's close for ever.
            for connection in self._connections:
                connection.abort()
            await self._listener.wait_closed()
        await self.resumables.close()

    @property
    def port(self) -> int:
        """The port it listens on."""
        port: int = next(iter(self._listener.sockets)).getsockname()[1]
        return port

    async def drain(self) -> None:
        """Stop serving: no new generations, running ones may finish until the deadline, then every client is closed."""
        self.state.draining = True
        self._finish_by = time.monotonic() + self._config.drain_timeout - min(CLOSING, self._config.drain_timeout / 2)
        for client in self._clients:
            client.go_away(self._time_to_finish)
        await _within(self._time_to_finish, self._all_idle())
        for client in self._clients:
            client.peer.stop_all("shutdown")
        await _within(STOP_GRACE, self._all_idle())
        clients = self._clients
        for client in clients:
            client.close(CloseCode.SERVICE_RESTART, "the server is stopping; connect again in a moment")
        await _within(2 * CLOSE_TIMEOUT + 1, asyncio.gather(*(client.closed() for client in clients)))

    @property
    def _clients(self) -> list[Client]:
        return [*self._connections, *self.guests]

    @property
    def _time_to_finish(self) -> float:
        return max(self._finish_by - time.monotonic(), 0.0)

    async def _all_idle(self) -> None:
        """Wait until nobody has an open id; what is resumed meanwhile counts too."""
        while busy := [client.peer for client in self._clients if client.peer.session.active]:
            await asyncio.gather(*(peer.idle() for peer in busy))

    async def _listen(self) -> asyncio.Server:
        return cast(asyncio.Server, await listen(self._config.host, self._config.port, self._arrivals.take))

    def _admit(self, address: Owner) -> Accepted:
        return Accepted(self._listener, self._config, self.state.accounts, self._reading, address)

    async def _accept(self, client: ServerConnection) -> None:
        # The kernel's own patience is the last resort: it closes without a word.
        tcp.set_options(client.transport, self._config.stall_timeout + 2 * CLOSE_TIMEOUT)
        if _path(client.request) == ECHO_PATH:
            await _echo(client)
            return
        session = Session(
            id=secrets.token_urlsafe(9),
            server=self.state,
            key=client.username or None,
            max_open=self._config.max_requests_per_connection,
            address=address_of(client.remote_address),
        )
        outbox = Outbox(self._config.max_outbox_bytes)
        whose = partial(self._door.whose, _address(client))
        connection = Connection(cast(Accepted, client), session, outbox, self.resumables, self._dispatch, whose)
        connection.once = ONCE in _query(client.request)
        # A look may come late by the time between two, when the peer's last sign of life was and when it is judged.
        patience = self._config.stall_timeout * (1 - 2 / LOOKS)
        self._connections[connection] = Liveness(time.monotonic(), patience)
        if self.state.draining:
            connection.go_away(self._time_to_finish)
        log.debug("session %s: opened from %s, key %s", session.id, _address(client), session.key)
        try:
            await connection.run()
        finally:
            del self._connections[connection]
            log.debug("session %s: closed with %s", session.id, client.close_code)

    def _look(self) -> None:
        """See who takes nothing any more, now and every now and then."""
        now = time.monotonic()
        if tcp.TELLS_TRAFFIC:
            for connection, liveness in self._connections.items():
                connection.look(liveness, now)
        self._next_look = asyncio.get_running_loop().call_later(self._config.stall_timeout / LOOKS, self._look)

    def _answer(self, client: ServerConnection, request: Request) -> Response | None:
        """Answer a plain GET, or a handshake that is refused; None where a handshake goes on."""
        match path := _path(request):
            case "/healthz":
                return client.respond(http.HTTPStatus.OK, "ok\n")
            case "/readyz":
                problem = "the server is stopping" if self.state.draining else self._problem()
                status = http.HTTPStatus.SERVICE_UNAVAILABLE if problem else http.HTTPStatus.OK
                return client.respond(status, f"{problem or 'ready'}\n")
        page = self._pages.get(path)
        # Who comes to /ws without a key may send it in an init, and the page asks for it.
        keyless = path == WS_PATH or page is not None or (self._config.open_http and path != ECHO_PATH)
        websocket = path == WS_PATH or (path == ECHO_PATH and self._config.echo_path)
        try:
            if websocket:
                self._count_handshake(client)
            client.username = self._door.admit(request.headers, _address(client), client.local_address[1], keyless) or ""
        except Denied as denied:
            response = client.respond(denied.status, f"{denied.reason}\n")
            response.headers.update(denied.headers)
            return response
        if websocket:
            return None  # without a handshake the library answers 426
        if page:
            return page.response()
        return client.respond(http.HTTPStatus.OK if path == "/" else http.HTTPStatus.NOT_FOUND, USAGE)

    def _count_handshake(self, client: ServerConnection) -> None:
        account = self.state.accounts.of(address_of(client.remote_address))
        now = time.monotonic()
        if wait := account.frames.wait(now) or account.handshakes.take(now):
            raise Denied(http.HTTPStatus.TOO_MANY_REQUESTS, TOO_MANY_HANDSHAKES, Retry_After=str(math.ceil(wait)))


def _path(request: Request | None) -> str:
    return request.path.partition("?")[0] if request else ""


def _query(request: Request | None) -> list[str]:
    return request.path.partition("?")[2].split("&") if request else []


def _address(client: ServerConnection) -> str:
    peer = client.remote_address
    return str(peer[0]) if peer else "somebody who has gone"


async def _echo(client: ServerConnection) -> None:
    """Answer every message with itself, sent as /ws sends its frames. There is no session, and a drain does not know it."""
    with contextlib.suppress(ConnectionClosed):
        async for message in client:
            broadcast((client,), message)


async def _within(seconds: float, work: Awaitable[object]) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)
