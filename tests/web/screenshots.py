"""Takes the pictures in docs/ that the README shows, of the default model's answers: `python -m tests.web.screenshots`."""

import asyncio
import re
from pathlib import Path

from playwright.async_api import expect

from tests.conftest import DEFAULT_MODEL, running
from tests.web.chromium import PHONE, Tab, chromium, open_tab, profile

DOCS = Path(__file__).parent.parent.parent / "docs"
PATIENCE = 60_000.0  # milliseconds
CODE = "Write a Python function that reverses a string."
STORY = "Tell me a short story about a lighthouse."
LIST = "Name three things to see in Paris, as a numbered list."


async def ask(tab: Tab, question: str) -> None:
    await tab.ask(question)
    await expect(tab.facts).to_contain_text("tokens/s", timeout=PATIENCE)


async def main() -> None:
    async with running(model=DEFAULT_MODEL) as server, server.client() as client, chromium() as browser:
        await client.send(type="init")
        await client.until("ready")
        async with profile(browser, device_scale_factor=2) as context:
            tab = await open_tab(context, server.url)
            await tab.button("Settings").click()
            await tab.page.get_by_label("Temperature").fill("0")
            await tab.page.get_by_label("Max tokens").fill("220")
            await tab.button("Close").click()
            await ask(tab, CODE)
            await tab.button("New chat").click()
            await ask(tab, LIST)
            await tab.button(CODE).click()
            await tab.page.mouse.move(700, 600)
            await tab.page.screenshot(path=DOCS / "wide.png")
            await tab.page.emulate_media(color_scheme="dark")
            await tab.button("New chat").click()
            await tab.ask(STORY)
            await expect(tab.said()).to_have_text(re.compile(r"(\S+\s+){60}"), timeout=PATIENCE)
            await tab.page.screenshot(path=DOCS / "dark.png")
            await tab.page.keyboard.press("Escape")
            await expect(tab.stop).to_be_hidden()
        async with profile(browser, viewport=PHONE, device_scale_factor=2, has_touch=True) as context:
            tab = await open_tab(context, server.url)
            await tab.ask(LIST)
            await expect(tab.said().locator("li")).to_have_count(2, timeout=PATIENCE)
            await tab.page.screenshot(path=DOCS / "phone.png")
            await tab.page.keyboard.press("Escape")
            await expect(tab.stop).to_be_hidden()


if __name__ == "__main__":
    asyncio.run(main())
