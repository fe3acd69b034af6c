"""The chat page where the server asks for a key."""

import pytest
from playwright.async_api import Browser, expect

from tests.scripted import scripted
from tests.test_auth import names
from tests.torture.proxy import PROXIED, Proxy
from tests.web.chromium import NEEDS_CHROMIUM, Tab, page_url, profile
from wsserver.auth import Keys, digest

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]


async def test_a_key_is_asked_for_where_the_server_wants_one_and_a_wrong_one_costs_one_try(browser: Browser) -> None:
    settings = {"keys": Keys({"alice": digest("sk-right")}), "max_auth_failures": 3}
    async with scripted(**settings) as (server, model), profile(browser) as context:
        model.open()
        tab = Tab(await context.new_page())
        await tab.page.goto(page_url(server.url))
        key, problem = tab.page.get_by_label("Key", exact=True), tab.page.locator("#key-problem")
        await expect(problem).to_be_empty()
        for wrong in ("sk-wrong", "no word of a header, ž"):
            await key.fill(wrong)
            await key.press("Enter")
            await expect(problem).to_contain_text("This key is wrong")
            await expect(key).to_be_empty()
        await key.fill("sk-right")
        await tab.button("Connect").click()
        await tab.connected()
        await tab.ask("abc")
        await expect(tab.said()).to_have_text("abc")
        assert set(names(server)) == {"alice"}
        await tab.page.reload()
        await tab.connected()
        await tab.button("Settings").click()
        await tab.button("Forget the key").click()
        await tab.page.reload()
        await expect(key).to_be_visible()
        assert tab.complaints == []


async def test_a_key_that_was_taken_away_is_asked_for_when_the_line_comes_back(browser: Browser) -> None:
    keys = Keys({"alice": digest("sk-old")})
    async with (
        scripted(allow_host=PROXIED, keys=keys) as (server, _),
        Proxy(server.server.port) as proxy,
        profile(browser) as context,
    ):
        tab = Tab(await context.new_page())
        await tab.page.goto(page_url(f"ws://127.0.0.1:{proxy.port}/ws"))
        key = tab.page.get_by_label("Key", exact=True)
        await key.fill("sk-old")
        await key.press("Enter")
        await tab.connected()
        keys.replace({"alice": digest("sk-new")})
        for link in proxy.links.values():
            link.cut()
        await key.fill("sk-new")
        await key.press("Enter")
        await tab.connected()
        assert tab.complaints == []
