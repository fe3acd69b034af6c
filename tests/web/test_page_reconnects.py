"""The chat page when its connection is lost, or is not to be had yet: what it shows, and what comes of the answer."""

import contextlib
import signal
import socket
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect
from websockets.datastructures import Headers

from tests.conftest import ECHO, eventually
from tests.scripted import scripted
from tests.test_main import process
from tests.torture.proxy import PROXIED, Proxy
from tests.web.chromium import NEEDS_CHROMIUM, Tab, opened, page_url, profile
from wsserver.door import Denied

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]

TEXT = "Once upon a time there was a cut."


async def test_a_line_cut_in_the_middle_is_shown_and_the_whole_text_comes(browser: Browser) -> None:
    async with (
        scripted(allow_host=PROXIED) as (server, model),
        Proxy(server.server.port) as proxy,
        opened(browser, f"ws://127.0.0.1:{proxy.port}/ws") as tab,
    ):
        model.step_gate.let(5)
        await tab.ask(TEXT)
        await expect(tab.said()).to_have_text(TEXT[:4])
        links = len(proxy.links)
        for link in proxy.links.values():
            link.cut()
        await expect(tab.connection).to_contain_text("Reconnecting in")
        model.open()
        await expect(tab.said()).to_have_text(TEXT)
        await expect(tab.connection).to_have_text("Connected")
        await expect(tab.facts).to_contain_text("tokens/s")
        assert len(proxy.links) == links + 1


async def test_a_page_loaded_anew_in_the_middle_of_an_answer_takes_it_up(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.step_gate.let(5)
        await tab.ask(TEXT)
        await expect(tab.said()).to_have_text(TEXT[:4])
        await tab.page.reload()
        await expect(tab.stop).to_be_enabled()
        model.open()
        await expect(tab.said()).to_have_text(TEXT)
        await expect(tab.stop).to_be_hidden()
        assert len(model.freed) == 1


async def test_a_server_killed_in_the_middle_and_started_again(browser: Browser, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    command = (sys.executable, "-m", "bench.sides.paced_echo", "20", "--model", ECHO, "--port", str(port))
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(process(tmp_path, *command))
        await server.says()
        tab = await stack.enter_async_context(opened(browser, f"ws://127.0.0.1:{port}/ws"))
        await tab.ask("word " * 400)
        await expect(tab.said()).to_contain_text("word word")
        server.signal(signal.SIGKILL)
        await expect(tab.connection).to_contain_text("Reconnecting in")
        await expect(tab.stop).to_be_enabled()
        server = await stack.enter_async_context(process(tmp_path, *command))
        await server.says()
        await tab.button("Try now").or_(tab.page.locator("#connection[data-state=open]")).first.click()
        await expect(tab.problem).to_contain_text("Cut off")
        await expect(tab.said()).to_contain_text("word word")
        await expect(tab.stop).to_be_hidden()
        await tab.ask("again")
        await expect(tab.said().last).to_have_text("again")
        # What a browser says of connections that fail.
        assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in tab.complaints)
        tab.complaints.clear()


async def test_where_no_connection_is_taken_yet_it_is_tried_again_by_itself_and_at_once_if_one_asks(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted() as (server, _), profile(browser) as context:
        door, refusals = server.server._door, iter(range(2))
        admit = door.admit

        def refuse(headers: Headers, *others: Any) -> str | None:
            if "Upgrade" in headers and next(refusals, None) is not None:
                raise Denied(HTTPStatus.SERVICE_UNAVAILABLE, "later")
            return admit(headers, *others)

        monkeypatch.setattr(door, "admit", refuse)
        tab = Tab(await context.new_page())
        await tab.page.clock.install()
        await tab.page.goto(page_url(server.url))
        await expect(tab.connection).to_have_text("Reconnecting in 3 s")
        await expect(tab.send).to_be_disabled()
        refused = len(tab.complaints)
        await tab.button("Try now").click()
        # The second try is refused too; the third comes by itself.
        await eventually(lambda: len(tab.complaints) > refused)
        await expect(tab.connection).to_have_text("Reconnecting in 3 s")
        await tab.page.clock.run_for(3_000)
        await tab.connected()
