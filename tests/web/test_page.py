"""The chat page as its user sees it, in Chromium, over the server with a model whose every step the test decides."""

import json
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from tests.conftest import ECHO, eventually, stopping
from tests.scripted import in_engine, put, scripted
from tests.web.chromium import NEEDS_CHROMIUM, open_tab, opened, profile

pytestmark = [NEEDS_CHROMIUM, pytest.mark.asyncio(loop_scope="module")]


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
        await in_engine(server, 2)
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
