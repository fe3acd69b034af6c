"""The page as a newcomer finds it: the address that the server prints, and the default model."""

import re
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.conftest import DEFAULT_MODEL
from tests.test_main import COMMAND, process
from tests.web.chromium import NEEDS_CHROMIUM, chromium, opened

pytestmark = NEEDS_CHROMIUM

PATIENCE = 60_000.0  # milliseconds, for a model on a busy machine


@pytest.mark.timeout(300)
async def test_whoever_opens_the_printed_address_chats_and_stops_and_chats_on(
    tmp_path: Path, default_model_folder: Path
) -> None:
    async with process(tmp_path, *COMMAND, "--port", "0") as server, chromium() as browser:
        assert re.match(rf"serving {DEFAULT_MODEL} ", await server.says())
        await server.says()
        address = (await server.says()).removeprefix("chat: ")
        async with opened(browser, address) as tab:
            await tab.page.locator("#suggestions button").last.click()
            await expect(tab.said()).to_have_text(re.compile(r"(\S+\s+){8}"), timeout=PATIENCE)
            await tab.stop.click()
            await expect(tab.stop).to_be_hidden()
            await expect(tab.facts).to_contain_text("stopped · ")
            partial = await tab.said().inner_text()
            await tab.button("Settings").click()
            await tab.page.get_by_label("Max tokens").fill("20")  # what was said before may lead it to go on and on
            await tab.button("Close").click()
            await tab.ask("What is the capital of France?")
            await expect(tab.facts).to_contain_text("tokens/s", timeout=PATIENCE)
            await expect(tab.said().last).to_have_text(re.compile(r"\w+ \w+"))
            assert await tab.said().first.inner_text() == partial
