"""The chat page as its user sees it, in Chromium, over the server with a model whose every step the test decides."""

import contextlib
import json
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect
from websockets.datastructures import Headers

from tests.conftest import ECHO, Running, eventually
from tests.scripted import put, scripted
from tests.test_auth import names
from tests.test_main import process
from tests.torture.proxy import PROXIED, Proxy
from tests.web.chromium import AXE, NEEDS_CHROMIUM, PHONE, WIDE, Tab, chromium, open_tab, opened, page_url, profile
from wsserver.auth import Keys, digest
from wsserver.door import Denied

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]

TEXT = "Once upon a time there was a cut."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


async def stopping(server: Running) -> None:
    """Wait until the server has read a cancel."""
    await eventually(lambda: any(job.stopping for job in server.server.resumables))


# Asking and stopping.


async def test_text_grows_until_stop_which_ends_it_at_once_and_keeps_it_and_then_one_can_ask_again(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        await expect(tab.stop).to_be_hidden()
        model.step_gate.let(5)
        await tab.ask("Once upon")
        await expect(tab.said()).to_have_text("Once")
        await expect(tab.stop).to_be_enabled()
        await expect(tab.send).to_be_hidden()
        model.step_gate.let(2)
        await expect(tab.said()).to_have_text("Once up")
        await tab.stop.click()
        await stopping(server)
        model.step_gate.let(1)
        await expect(tab.stop).to_be_hidden()
        await expect(tab.said()).to_have_text("Once up")
        await expect(tab.facts).to_contain_text("stopped · ")
        model.open()
        await tab.ask("again")
        await expect(tab.said().last).to_have_text("again")
        await expect(tab.stop).to_be_hidden()
        await expect(tab.facts).to_contain_text("6 tokens")
        await expect(tab.facts).to_contain_text("tokens/s")
        await expect(tab.facts).to_contain_text("first token after")
        await expect(tab.said().first).to_have_text("Once up")


async def test_who_has_no_question_is_given_some(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.open()
        suggestion = tab.page.locator("#suggestions button").first
        text = await suggestion.inner_text()
        await suggestion.click()
        await expect(tab.said("You")).to_have_text(text)
        await expect(tab.said()).to_have_text(text)
        await expect(suggestion).to_be_hidden()


async def test_the_keyboard_alone_does_it(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        await expect(tab.question).to_be_focused()
        await tab.page.keyboard.type("one")
        await tab.page.keyboard.press("Shift+Enter")
        await tab.page.keyboard.type("two")
        await expect(tab.said("You")).to_have_count(0)
        await tab.page.keyboard.press("Enter")
        await expect(tab.said("You")).to_have_text("one\ntwo")
        model.step_gate.let(2)
        await expect(tab.said()).to_have_text("on")
        await tab.page.keyboard.press("Escape")
        await stopping(server)
        model.open()
        await expect(tab.facts).to_contain_text("stopped")
        await tab.page.keyboard.type("on")
        await expect(tab.question).to_have_value("on")


async def test_an_answer_is_regenerated_and_a_question_edited_and_sent_again(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.open()
        for number, text in enumerate(("first", "second")):
            await tab.ask(text)
            await expect(tab.said().nth(number)).to_have_text(text)
        await expect(tab.button("Regenerate")).to_have_count(1)
        await tab.button("Regenerate").click()
        await expect(tab.said()).to_have_text(["first", "second"])
        await expect(tab.stop).to_be_hidden()
        assert [request["messages"][-1]["content"] for request in generates(tab.sent)] == ["first", "second", "second"]
        await tab.button("Edit").first.click()
        editor = tab.page.get_by_role("textbox", name="Message, edited")
        await expect(editor).to_have_value("first")
        await editor.press("Escape")
        await expect(tab.said("You")).to_have_text(["first", "second"])
        await tab.button("Edit").first.click()
        await editor.fill("other")
        await editor.press("Enter")
        await expect(tab.said()).to_have_text(["other"])
        await expect(tab.said("You")).to_have_text(["other"])
        assert [message["content"] for message in generates(tab.sent)[-1]["messages"]] == ["other"]


def generates(sent: list[str]) -> list[dict[str, Any]]:
    return [message for message in map(json.loads, sent) if message["type"] == "generate"]


async def test_the_settings_go_with_the_question_and_into_the_next_conversation(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.open()
        await tab.button("Settings").click()
        await tab.page.get_by_label("System prompt").fill("Rhyme.")
        await tab.page.get_by_label("Temperature").fill("0.5")
        await tab.page.get_by_label("Stop at").fill("x\ny")
        await tab.button("Close").click()
        for _ in range(2):
            await tab.ask("abc")
            await expect(tab.facts).to_contain_text("tokens")
            await tab.button("New chat").click()
        for request in generates(tab.sent):
            assert request["messages"] == [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "abc"}]
            assert (request["temperature"], request["stop"], "top_p" in request) == (0.5, ["x", "y"], False)


async def test_what_is_refused_is_told_under_the_question(browser: Browser) -> None:
    async with scripted() as (server, _), opened(browser, server.url) as tab:
        await tab.button("Settings").click()
        await tab.page.get_by_label("Max tokens").fill("70000")
        await tab.button("Close").click()
        await tab.ask("abc")
        await expect(tab.problem).to_contain_text("70000")
        await expect(tab.stop).to_be_hidden()
        await tab.page.evaluate("document.querySelector('#question').value = 'x'.repeat(300000)")
        await tab.send.click()
        await expect(tab.problem).to_contain_text("too long")


async def test_who_waits_is_told_the_place_in_line(browser: Browser) -> None:
    async with scripted(max_active=1) as (server, model), server.client() as other, opened(browser, server.url) as tab:
        await other.send(type="generate", prompt="abcdef")
        await model.in_step(1)
        await tab.ask("mine")
        await expect(tab.page.locator(".wait").last).to_have_text("…")
        model.step_gate.let(1)
        await expect(tab.page.locator(".wait").last).to_have_text("Waiting in line, place 1")
        model.open()
        await expect(tab.said()).to_have_text("mine")
        await expect(tab.page.locator(".wait").last).to_be_empty()


# Models and conversations.


async def test_another_model_is_picked_and_its_load_shown(browser: Browser) -> None:
    async with scripted() as (server, _):
        model = put(server.models, "test/other")
        model.load_gate.shut()
        model.step_gate.open()
        async with opened(browser, server.url) as tab:
            picker = tab.page.get_by_label("Model", exact=True)
            await expect(picker).to_have_value(ECHO)
            other = picker.locator("option[value='test/other']")
            await expect(other).to_have_text("test/other – not loaded")
            await picker.select_option("test/other")
            await expect(tab.page.get_by_role("progressbar")).to_be_visible()
            await expect(tab.page.locator("#load-stage")).to_have_text("Loading config 0 %")
            model.load_gate.open()
            await expect(tab.page.get_by_role("progressbar")).to_be_hidden()
            await expect(other).to_have_text("test/other")
            await tab.ask("abc")
            await expect(tab.said()).to_have_text("abc")
            assert len(model.steps) > 0
            await tab.page.reload()
            await expect(picker).to_have_value("test/other")


async def test_conversations_are_kept_and_one_goes_on_while_another_is_read(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.step_gate.let(2)
        await tab.ask("first")
        await expect(tab.said()).to_have_text("fi")
        await tab.button("New chat").click()
        await expect(tab.stop).to_be_hidden()
        model.open()
        await tab.ask("second")
        await expect(tab.said()).to_have_text("second")
        await tab.button("first").click()
        await expect(tab.said()).to_have_text("first")
        await tab.page.reload()
        await expect(tab.said()).to_have_text("first")
        await expect(tab.button("second")).to_be_visible()
        await tab.page.locator("#conversations li", has_text="first").hover()
        tab.agrees = False
        await tab.button("Delete: first").click()
        await expect(tab.said()).to_have_text("first")
        tab.agrees = True
        await tab.button("Delete: first").click()
        await expect(tab.button("first")).to_have_count(0)
        await expect(tab.said()).to_have_count(0)


async def test_what_is_deleted_in_the_middle_stays_deleted(browser: Browser) -> None:
    async with scripted() as (server, model), opened(browser, server.url) as tab:
        model.step_gate.let(1)
        await tab.ask("first")
        await expect(tab.said()).to_have_text("f")
        await tab.page.locator("#conversations li").hover()
        await tab.button("Delete: first").click()
        await stopping(server)
        model.open()
        await eventually(lambda: len(model.freed) == 1)
        await tab.ask("second")
        await expect(tab.facts).to_contain_text("tokens")
        await tab.page.reload()
        await expect(tab.page.locator("#conversations li")).to_have_text(["second✕"])


async def test_two_tabs_at_once_have_each_their_own_answer_and_know_of_the_others(browser: Browser) -> None:
    async with scripted() as (server, model), profile(browser) as context:
        one, other = await open_tab(context, server.url), await open_tab(context, server.url)
        model.step_gate.let(2)
        await one.ask("first")
        await other.ask("second")
        await expect(one.stop).to_be_enabled()
        await expect(other.stop).to_be_enabled()
        model.open()
        await expect(one.said()).to_have_text(["first"])
        await expect(other.said()).to_have_text(["second"])
        await expect(one.button("second")).to_be_visible()
        await expect(other.button("first")).to_be_visible()
        await other.button("first").click()
        await expect(other.said()).to_have_text(["first"])
        assert one.complaints == other.complaints == []


# Connections that are lost.


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


# Keys.


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


# Hostile text, and the policy behind it.

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


# Markdown.

CUTS = r"""
async ([source, cuts]) => {
  const { Markdown, blocks, parsed } = await import("/markdown.js");
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


# For everybody.


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
