"""Markdown in the chat page: it looks the same however it comes in pieces, and what is copied is what was meant."""

import random

import pytest
from playwright.async_api import Browser, expect

from tests.scripted import scripted
from tests.web.chromium import NEEDS_CHROMIUM, opened

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]

CUTS = r"""
async ([source, cuts]) => {
  const { Markdown, blocks } = await import("/markdown.js");
  const { parsed } = await import("/bounded_lexer.js");
  window.requestAnimationFrame = (show) => setTimeout(() => show(performance.now())); // no screen is waited for
  const [grown, whole] = [document.createElement("div"), document.createElement("div")];
  const markdown = new Markdown(grown);
  let from = 0;
  for (const to of [...cuts, source.length]) {
    markdown.append(source.slice(from, to));
    if (to % 3) await new Promise(requestAnimationFrame);
    from = to;
  }
  markdown.finish();
  whole.append(...blocks(parsed(source)));
  for (const element of [grown, whole]) element.normalize();
  // How many empty lines end a code block that was never closed, nobody sees.
  return [grown, whole].map(({ innerHTML }) => innerHTML.replace(/\n+<[/]code>/g, "</code>"));
}
"""
PIECES = (
    "# A heading\n\n",
    "Some *words* and\nmore, **bold\n\n",
    "1. one\n\n",
    "2. two\n   - sub\n\n   a paragraph\n",
    "- point\n- [x] done\n",
    "```python\ndef f():\n\n    return '``'\n```\n",
    "~~~\n```\n~~~\n\n",
    "   ```\n   indented\n   ```\n",
    "````\n```\n````\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    "> quoted\n> more\n\n",
    "    code by indent\n\n    more of it\n\n",
    "A line\n---\n\n***\n\n",
    "<div>\nnot *markup*\n\n",
    "žluťoučký 🐎 &amp; `x &lt; y`\r\n\r\n",
    "```\nnever closed\n``",
)


async def test_text_that_comes_in_pieces_looks_as_if_it_had_come_at_once(browser: Browser) -> None:
    draw = random.Random(7)
    async with scripted() as (server, _), opened(browser, server.url) as tab:
        for _ in range(25):
            source = "".join(draw.choices(PIECES, k=draw.randint(1, 6)))
            cuts = sorted(draw.sample(range(1, len(source)), min(len(source) - 1, draw.randint(1, 40))))
            grown, whole = await tab.page.evaluate(CUTS, [source, cuts])
            assert grown == whole, (source, cuts)


async def test_code_is_copied_and_so_is_an_answer(browser: Browser) -> None:
    permissions = {"permissions": ["clipboard-read", "clipboard-write"]}
    async with scripted() as (server, model), opened(browser, server.url, **permissions) as tab:
        model.open()
        await tab.ask("before\n```sh\nls -l\n```\n")
        await expect(tab.facts).to_contain_text("tokens")
        await expect(tab.page.locator(".language")).to_have_text("sh")
        await tab.page.locator(".code").get_by_role("button", name="Copy").click()
        await expect(tab.page.locator(".code").get_by_role("button", name="Copied")).to_be_visible()
        assert await tab.page.evaluate("navigator.clipboard.readText()") == "ls -l"
        await tab.page.locator("article:last-child footer").get_by_role("button", name="Copy").click()
        assert await tab.page.evaluate("navigator.clipboard.readText()") == "before\n```sh\nls -l\n```\n"
