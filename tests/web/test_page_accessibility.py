"""Whether everybody can use the chat page: what axe finds, a phone's screen, an answer longer than any screen."""

import pytest
from playwright.async_api import Browser, expect

from tests.scripted import scripted
from tests.web.chromium import AXE, NEEDS_CHROMIUM, PHONE, WIDE, Tab, opened

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: npm ci --prefix tests/web")
@pytest.mark.parametrize(("colours", "screen"), [("light", WIDE), ("dark", PHONE)], ids=["light, wide", "dark, phone"])
async def test_axe_finds_nothing_serious(browser: Browser, colours: str, screen: dict[str, int]) -> None:
    # axe is put into the page by hand, which the policy would not let it do.
    options = {"viewport": screen, "color_scheme": colours, "bypass_csp": True}
    async with scripted() as (server, model), opened(browser, server.url, **options) as tab:
        assert await serious(tab) == []
        model.open()
        await tab.ask("# One\n\n- two [three](https://example.com) `four`\n\n```sh\nls\n```\n")
        await expect(tab.facts).to_contain_text("tokens")
        assert await serious(tab) == []
        model.step_gate.shut()
        await tab.ask("more")
        await expect(tab.stop).to_be_visible()
        assert await serious(tab) == []
        await tab.button("Settings").click()
        assert await serious(tab) == []


async def serious(tab: Tab) -> list[str]:
    await tab.page.add_script_tag(path=AXE)
    found = await tab.page.evaluate("axe.run()")
    bad = [violation for violation in found["violations"] if violation["impact"] in ("serious", "critical")]
    return [f"{violation['id']}: {node['html']}" for violation in bad for node in violation["nodes"]]


async def test_on_a_phone_it_fits_and_the_conversations_come_when_they_are_asked_for(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url, viewport=PHONE, has_touch=True) as tab:
        model.open()
        await tab.ask("wide " + "w" * 300 + "\n\n```\n" + "c" * 300 + "\n```\n")
        await expect(tab.facts).to_contain_text("tokens")
        assert await tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert await tab.page.evaluate("document.querySelector('#scroller').scrollWidth") <= PHONE["width"]
        await expect(tab.button("New chat")).to_be_hidden()
        await tab.button("Show conversations").click()
        await tab.button("New chat").click()
        await expect(tab.button("New chat")).to_be_hidden()
        await expect(tab.said()).to_have_count(0)


async def test_a_long_answer_keeps_its_end_in_sight_unless_one_has_scrolled_up(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        text = "".join(f"line {number}\n\n" for number in range(100))
        model.step_gate.let(400)
        await tab.ask(text)
        await expect(tab.said()).to_contain_text("line 40")
        await expect(tab.said().get_by_text("line 40")).to_be_in_viewport()
        await tab.page.locator("#scroller").hover()
        await tab.page.mouse.wheel(0, -2000)
        await expect(tab.button("Go to the end")).to_be_visible()
        model.open()
        await expect(tab.said()).to_contain_text("line 99")
        await expect(tab.said().get_by_text("line 99")).not_to_be_in_viewport()
        await tab.button("Go to the end").click()
        await expect(tab.said().get_by_text("line 99")).to_be_in_viewport()
        await expect(tab.button("Go to the end")).to_be_hidden()
