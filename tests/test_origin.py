"""Origin and Host: which pages may connect, and under which names the server is found."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.conftest import Running, running
from tests.test_server import get
from wsserver.origin import host_is_known, is_host, is_loopback, normal_origin, origin_may_connect

UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


# The rules.


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.0.2.1", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_only_an_address_of_the_machine_s_own_is_loopback(host: str, loopback: bool):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("origin", "normal"),
    [
        ("null", "null"),
        ("HTTPS://Chat.Example.com", "https://chat.example.com"),
        ("https://a:443", "https://a"),
        ("http://a:80", "http://a"),
        ("http://a:443", "http://a:443"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("", None),
        ("NULL", None),
        ("*", None),
        ("https://", None),
        ("https://a/", None),
        ("https://a/b", None),
        ("https://a:", None),
        ("https://a:b", None),
        ("https://u@a", None),
        ("https://a b", None),
        ("https://a\n", None),
        ("https://a, https://b", None),
        ("file://", None),
    ],
)
def test_an_origin_is_compared_in_one_form(origin: str, normal: str | None):
    assert normal_origin(origin) == normal


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "may"),
    [
        ("http://localhost:41443", "localhost:41443", (), True),
        ("https://localhost:41443", "localhost:41443", (), True),
        ("https://chat.example.com", "chat.example.com", (), True),
        ("https://chat.example.com", "CHAT.example.com:443", (), True),
        ("http://chat.example.com", "chat.example.com:80", (), True),
        ("http://[::1]:41443", "[::1]:41443", (), True),
        ("http://localhost:3000", "localhost:41443", (), False),
        ("http://localhost", "localhost:41443", (), False),
        ("http://127.0.0.1:41443", "localhost:41443", (), False),
        ("https://evil.example", "localhost:41443", (), False),
        ("https://localhost:41443.evil.example", "localhost:41443", (), False),
        ("https://chat.example.com", "chat.example.com:8443", (), False),
        ("null", "localhost:41443", (), False),
        ("null", "null", (), False),
        ("null", "localhost:41443", ("null",), True),
        ("", "localhost:41443", ("null",), False),
        ("", "", ("null",), False),
        ("http://", "", (), False),
        ("ftp://localhost:41443", "localhost:41443", (), False),
        ("https://a.example", "localhost:41443", ("https://b.example", "https://A.example:443"), True),
        ("http://a.example", "localhost:41443", ("https://a.example",), False),
        ("https://a.example:8443", "localhost:41443", ("https://a.example",), False),
        ("https://b.a.example", "localhost:41443", ("https://a.example",), False),
        ("chrome-extension://abc", "localhost:41443", ("chrome-extension://abc",), True),
        ("chrome-extension://abc", "abc", (), False),
    ],
)
def test_the_own_origin_and_those_of_the_list_may_connect(origin: str, host: str, allowed: tuple[str, ...], may: bool):
    assert origin_may_connect(origin, host, allowed) == may


@pytest.mark.parametrize(
    ("host", "served", "allowed", "known"),
    [
        ("localhost:5", "127.0.0.1", (), True),
        ("LOCALHOST:5", "127.0.0.1", (), True),
        ("127.0.0.1:5", "127.0.0.1", (), True),
        ("[::1]:5", "::1", (), True),
        ("127.0.0.2:5", "127.0.0.2", (), True),
        ("127.0.0.2:5", "127.0.0.1", (), False),
        ("localhost:6", "127.0.0.1", (), False),
        ("localhost", "127.0.0.1", (), False),
        ("evil.example:5", "127.0.0.1", (), False),
        ("localhost.evil.example:5", "127.0.0.1", (), False),
        ("evil.example:5", "localhost", (), False),
        ("", "127.0.0.1", (), False),
        ("localhost:5:5", "127.0.0.1", (), False),
        ("user@localhost:5", "127.0.0.1", (), False),
        ("localhost:5, evil.example", "127.0.0.1", (), False),
        ("chat.example", "127.0.0.1", ("chat.example",), True),
        ("chat.example:9", "127.0.0.1", ("Chat.Example",), True),
        ("chat.example:9", "127.0.0.1", ("chat.example:9",), True),
        ("chat.example:9", "127.0.0.1", ("chat.example:8",), False),
        ("localhost:5", "127.0.0.1", ("chat.example",), True),
        ("localhost:8080", "127.0.0.1", ("localhost:8080",), True),
        ("anything", "0.0.0.0", (), True),
        ("", "0.0.0.0", (), True),
        ("anything", "0.0.0.0", ("chat.example",), False),
        ("localhost:5", "0.0.0.0", ("chat.example",), False),
        ("chat.example:5", "0.0.0.0", ("chat.example",), True),
    ],
)
def test_the_names_of_a_server_are_those_of_its_address_and_of_the_list(
    host: str, served: str, allowed: tuple[str, ...], known: bool
):
    assert host_is_known(host, served, 5, 80, allowed) == known


@pytest.mark.parametrize(("default_port", "port", "known"), [(80, 80, True), (443, 443, True), (80, 443, False)])
def test_a_host_without_a_port_means_that_of_the_scheme(default_port: int, port: int, known: bool):
    assert host_is_known("localhost", "127.0.0.1", port, default_port, ()) == known


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_confuses_the_rules_or_lets_a_stranger_in(origin: str, host: str):
    if origin_may_connect(origin, host, ()):
        assert is_host(host)
        assert origin.lower().startswith(("http://", "https://"))
    if host_is_known(host, "127.0.0.1", 5, 80, ()):
        assert host.lower() in ("localhost:5", "127.0.0.1:5", "[::1]:5")


# At a socket.


async def status(server: Running, *headers: str, path: str = "/ws") -> tuple[int, str]:
    """Shake hands with some headers; give the status and the body of the answer."""
    async with connect_raw(server) as (send, read):
        send(f"GET {path} HTTP/1.1\r\n{UPGRADE}" + "".join(f"{header}\r\n" for header in headers) + "\r\n")
        head = (await read.readuntil(b"\r\n\r\n")).decode()
        code = int(head.split(" ", 2)[1])
        return code, "" if code == 101 else (await read.read()).decode()


@contextlib.asynccontextmanager
async def connect_raw(server: Running) -> AsyncIterator:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
    try:
        yield lambda text: writer.write(text.encode("latin-1")), reader
    finally:
        writer.transport.abort()


async def test_a_page_of_another_origin_is_refused_in_one_line_and_a_client_without_one_is_served(
    echo: Running, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "wsserver.door")
    port = echo.server.port
    host = f"Host: localhost:{port}"
    assert (await status(echo, host))[0] == 101
    assert (await status(echo, host, f"Origin: http://localhost:{port}"))[0] == 101
    assert caplog.text == ""
    for origin in ("https://evil.example", "http://localhost", "null", "", "https://evil.example\xe9"):
        code, reason = await status(echo, host, f"Origin: {origin}")
        assert code == 403
        assert reason.count("\n") == 1
        assert "--allow-origin" in reason
        assert "evil" not in reason
    # What an operator may want to allow is told, in letters that no terminal obeys.
    assert "https://evil.example\\xe9" in caplog.messages[-1]
    assert "127.0.0.1: refused" in caplog.messages[-1]


async def test_two_origins_or_hosts_are_none(echo: Running):
    host, own = f"Host: localhost:{echo.server.port}", f"Origin: http://localhost:{echo.server.port}"
    assert (await status(echo, host, own, own))[0] == 403
    assert (await status(echo, host, host))[0] == 403
    assert (await status(echo))[0] == 403


async def test_a_host_that_is_not_the_server_s_is_refused_with_what_asks_for_it_and_health_is_told_all_the_same(
    echo: Running,
):
    port = echo.server.port
    # A page of evil.example, whose name points to 127.0.0.1 by now, is of the same origin as the host it names.
    code, reason = await status(echo, f"Host: evil.example:{port}", f"Origin: http://evil.example:{port}")
    assert code == 403
    assert reason.count("\n") == 1
    assert "--allow-host" in reason
    for path, expected in (("/", 403), ("/ws", 403), ("/healthz", 200), ("/readyz", 503)):
        assert (await status(echo, "Host: evil.example", path=path))[0] == expected
    assert (await status(echo, "Host: localhost:1"))[0] == 403


async def test_what_the_operator_lists_is_let_in():
    async with running(allow_origin=("https://chat.example", "null"), allow_host=("proxy.example",)) as server:
        host = f"Host: localhost:{server.server.port}"
        for headers in (
            [host, "Origin: https://chat.example"],
            [host, "Origin: null"],
            ["Host: proxy.example", "Origin: https://proxy.example"],
            ["Host: proxy.example:8080"],
        ):
            assert (await status(server, *headers))[0] == 101
        assert (await status(server, host, "Origin: https://other.example"))[0] == 403
        assert (await status(server, "Host: other.example"))[0] == 403


async def test_elsewhere_than_on_a_loopback_address_any_host_is_known_but_no_other_origin():
    async with running(host="0.0.0.0", insecure=True) as server:
        assert (await status(server, "Host: anything"))[0] == 101
        assert (await status(server, "Host: anything", "Origin: http://anything"))[0] == 101
        assert (await status(server, "Host: anything", "Origin: http://other"))[0] == 403


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as tried:
        try:
            tried.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no second loopback address")
async def test_the_port_is_that_of_the_socket_a_client_came_to(monkeypatch: pytest.MonkeyPatch):
    async def two(*args: object, **more: object) -> list[tuple[object, ...]]:
        kind = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        return [(socket.AF_INET, *kind, ("127.0.0.1", 0)), (socket.AF_INET6, *kind, ("::1", 0, 0, 0))]

    # "localhost" may be two addresses, and port 0 gives each a port of its own.
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
    async with running(host="localhost") as server:
        monkeypatch.undo()
        assert len(server.server._listener.sockets) == 2
        for listening in server.server._listener.sockets:
            address, port, *_ = listening.getsockname()
            shown = f"[{address}]" if listening.family == socket.AF_INET6 else address
            async with connect(f"ws://{shown}:{port}/ws", compression=None):
                pass
            with pytest.raises(InvalidStatus, match="403"):
                await connect(f"ws://{shown}:{port}/ws", origin="http://localhost:1", compression=None)


async def test_the_echo_path_and_the_front_page_ask_the_same():
    async with running(echo_path=True) as server:
        host = f"Host: localhost:{server.server.port}"
        for path in ("/echo", "/", "/nothing"):
            assert (await status(server, host, "Origin: https://evil.example", path=path))[0] == 403
        assert (await status(server, host, path="/echo"))[0] == 101
        assert (await get(server, "/"))[0] == 200
