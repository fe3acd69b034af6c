"""Which pages a real browser lets through to the server: its own, and those of other origins only where they are listed."""

import contextlib
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from tests.conftest import Running, running
from tests.web.chromium import NEEDS_CHROMIUM, profile

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]

# What a script on a page does and learns: the code of the close, and the answer it was given before.
CONNECT = """url => new Promise(tell => {
  const heard = [];
  const socket = new WebSocket(url);
  socket.onopen = () => socket.send(JSON.stringify({type: "generate", id: "g", prompt: "hello"}));
  socket.onmessage = ({data}) => {
    const frame = JSON.parse(data);
    if (frame.type === "token") heard.push(frame.text);
    if (frame.type === "done") socket.close();
  };
  socket.onclose = ({code}) => tell({code, heard: heard.join("")});
})"""
REFUSED = {"code": 1006, "heard": ""}  # a browser tells a page no more than that it failed
SERVED = {"code": 1005, "heard": "hello"}


@contextlib.asynccontextmanager
async def elsewhere() -> AsyncIterator[str]:
    """Serve an empty page on another port of this machine; give its origin."""

    def page(client: ServerConnection, request: Request) -> Response:
        return client.respond(HTTPStatus.OK, "a page\n")

    async def nobody(client: ServerConnection) -> None:
        pass

    async with serve(nobody, "127.0.0.1", 0, process_request=page) as server:
        yield f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


async def told(browser: Browser, page: str, url: str) -> dict[str, Any]:
    """Give what a script learns that connects to `url` from a page."""
    async with profile(browser) as context:
        tab = await context.new_page()
        await tab.goto(page)
        found: dict[str, Any] = await tab.evaluate(CONNECT, url)
        return found


def origins(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Give the origins that the server says it has refused."""
    return [record.getMessage().rpartition("Origin ")[2] for record in caplog.records if "refused" in record.getMessage()]


def own(server: Running, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server.port}"


async def test_a_page_of_the_server_s_own_origin_is_let_in_and_streams(browser: Browser) -> None:
    async with running() as server:
        assert await told(browser, own(server), server.url) == SERVED
        assert await told(browser, own(server, "localhost"), server.url.replace("127.0.0.1", "localhost")) == SERVED


async def test_a_page_of_another_port_is_refused(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "wsserver")
    async with running() as server, elsewhere() as origin:
        assert await told(browser, origin, server.url) == REFUSED
        assert origins(caplog) == [f"[{origin!r}]"]
        assert not server.server._connections


async def test_a_page_of_another_port_is_let_in_where_the_operator_lists_it(browser: Browser) -> None:
    async with elsewhere() as origin, running(allow_origin=(origin,)) as server:
        assert await told(browser, origin, server.url) == SERVED


async def test_a_page_opened_as_a_file_is_refused_unless_null_is_listed(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("a page")
    async with running() as strict, running(allow_origin=("null",)) as lax:
        assert await told(browser, page.as_uri(), strict.url) == REFUSED
        assert await told(browser, page.as_uri(), lax.url) == SERVED


async def test_a_name_of_somebody_else_s_that_leads_to_this_machine_is_refused(browser: Browser) -> None:
    # A browser takes every name under localhost for this machine, as it would any whose owner lets it point here.
    async with running() as server, profile(browser) as context:
        tab = await context.new_page()
        response = await tab.goto(own(server, "rebound.localhost"))
        assert response is not None
        assert response.status == HTTPStatus.FORBIDDEN
        assert await tab.evaluate(CONNECT, server.url.replace("127.0.0.1", "rebound.localhost")) == REFUSED
