"""The page in Debian's Chromium: opened, driven by what a person would do, and judged for what it complains of."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Locator, Page, async_playwright, expect

CHROMIUM = shutil.which("chromium")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
WIDE = {"width": 1200, "height": 800}
PHONE = {"width": 390, "height": 780}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

expect.set_options(timeout=10_000)


class Tab:
    """The page in one tab, by the names of what is on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.sent: list[str] = []  # messages to the server
        self.agrees = True  # to what the page asks whether it is meant
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        page.on("dialog", lambda dialog: dialog.accept() if self.agrees else dialog.dismiss())
        page.on("websocket", lambda socket: socket.on("framesent", lambda text: self.sent.append(text)))
        self.question = page.get_by_role("textbox", name="Message", exact=True)
        self.send = page.get_by_role("button", name="Send", exact=True)
        self.stop = page.get_by_role("button", name="Stop")
        self.connection = page.locator("#connection")
        self.problem = page.locator("article:last-child .problem")
        self.facts = page.locator("article:last-child .facts")

    def said(self, who: str = "Answer") -> Locator:
        """Give the texts of one side's messages."""
        return self.page.get_by_role("article", name=who).locator(".body")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    async def ask(self, text: str) -> None:
        await self.question.fill(text)
        await self.question.press("Enter")

    async def connected(self) -> None:
        await expect(self.connection).to_have_attribute("data-state", "open")
        await expect(self.send.or_(self.stop)).to_be_enabled()


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@contextlib.asynccontextmanager
async def profile(browser: Browser, **options: Any) -> AsyncIterator[BrowserContext]:
    """A browser that has never been here."""
    context = await browser.new_context(**{"viewport": WIDE, **options})
    yield context
    await context.close()


async def open_tab(context: BrowserContext, url: str) -> Tab:
    """Open the page of the server whose WebSocket is at `url`, and wait for its connection."""
    tab = Tab(await context.new_page())
    await tab.page.goto(page_url(url))
    await tab.connected()
    return tab


@contextlib.asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[Tab]:
    """Open the page in a browser that has never been here; it must have complained of nothing in the end."""
    async with profile(browser, **options) as context:
        tab = await open_tab(context, url)
        yield tab
        assert tab.complaints == []


def page_url(url: str) -> str:
    return url.replace("ws://", "http://").removesuffix("ws")
