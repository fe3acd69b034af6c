"""The page in a browser that keeps nothing for it, or nothing more."""

import pytest
from playwright.async_api import Browser, expect

from tests.conftest import ECHO
from tests.scripted import put, scripted
from tests.web.chromium import NEEDS_CHROMIUM, open_tab, profile

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]

# As where all cookies are blocked: already to look at it throws.
NOTHING = """
    for (const name of ["localStorage", "sessionStorage"]) {
      Object.defineProperty(window, name, { get() { throw new DOMException("Access is denied.", "SecurityError"); } });
    }
"""
NO_ROOM = """
    Storage.prototype.setItem = (key) => {
      if (key.startsWith("wsserver.conversation.")) throw new DOMException("No room.", "QuotaExceededError");
    };
"""


async def test_where_the_browser_keeps_nothing_the_page_works_and_says_so(browser: Browser) -> None:
    async with scripted() as (server, model), profile(browser) as context:
        put(server.models, "test/other").open()
        model.open()
        await context.add_init_script(NOTHING)
        tab = await open_tab(context, server.url)
        await expect(tab.page.locator("#notice")).to_contain_text("keep nothing")
        await tab.ask("first")
        await expect(tab.said()).to_have_text("first")
        await tab.button("New chat").click()
        await tab.page.get_by_label("Model", exact=True).select_option("test/other")
        await tab.ask("second")
        await expect(tab.said()).to_have_text("second")
        await tab.page.locator("#conversations").get_by_text("first").click()
        await expect(tab.said()).to_have_text("first")
        await tab.page.reload()
        await tab.connected()
        await expect(tab.said()).to_have_count(0)
        await expect(tab.page.get_by_label("Model", exact=True)).to_have_value(ECHO)
        assert tab.complaints == []


async def test_where_the_browser_has_no_room_left_the_answer_comes_and_the_page_says_so(browser: Browser) -> None:
    async with scripted() as (server, model), profile(browser) as context:
        model.open()
        await context.add_init_script(NO_ROOM)
        tab = await open_tab(context, server.url)
        await expect(tab.page.locator("#notice")).to_be_hidden()
        await tab.ask("hello")
        await expect(tab.said()).to_have_text("hello")
        await expect(tab.page.locator("#notice")).to_contain_text("no room left")
        assert tab.complaints == []
