"""`wsserver chat` as its user sees it: a terminal, what is typed, what is shown, and how it ends."""

from collections.abc import AsyncIterator

import pytest

from tests.conftest import eventually
from tests.pseudo_terminal import CTRL_C, CTRL_D, PseudoTerminal, in_terminal
from tests.scripted import put
from tests.stage import MORE, TEXT, Stage
from tests.test_ask import recording
from wsserver import chat, shell

PROMPT, ANSWER = "\x1b[?2004h", "\x1b[?2004l"  # from here on what is typed is the prompt's, and no longer is
BEGUN = f"{ANSWER}012"


@pytest.fixture
async def terminal(stage: Stage) -> AsyncIterator[PseudoTerminal]:
    """A chat that waits for its first line."""
    async with in_terminal("chat", WSSERVER_URL=stage.url) as terminal:
        await terminal.shows("Ctrl-C stops an answer")
        await terminal.shows(PROMPT)
        yield terminal


async def test_an_answer_is_shown_as_it_comes_and_then_how_it_was(stage: Stage, terminal: PseudoTerminal) -> None:
    terminal.type("hello\r")
    for letter in "hello":
        stage.model.step_gate.let(1)
        await terminal.shows(letter)
    stage.model.open()
    await terminal.shows("\r\n[6 tokens, ")
    await terminal.shows(PROMPT)
    terminal.type(CTRL_D)
    assert await terminal.ends() == shell.OK


async def test_ctrl_c_stops_the_answer_and_leaves_when_there_is_none(stage: Stage, terminal: PseudoTerminal) -> None:
    terminal.type(TEXT + "\r")
    stage.model.step_gate.let(3)
    await terminal.shows(BEGUN)
    terminal.type(CTRL_C)
    await stage.stopping()
    stage.model.step_gate.let(1)
    await terminal.shows("[stopped, ")
    await terminal.shows(PROMPT)
    stage.model.open()
    terminal.type("once more\r")
    await terminal.shows(f"{ANSWER}once more\r\n[")
    await terminal.shows(PROMPT)
    terminal.type(CTRL_C)
    assert await terminal.ends() == shell.OK
    await stage.idle()


async def test_a_second_ctrl_c_leaves_though_the_answer_has_not_ended(stage: Stage, terminal: PseudoTerminal) -> None:
    terminal.type(TEXT + "\r")
    stage.model.step_gate.let(3)
    await terminal.shows(BEGUN)
    terminal.type(CTRL_C)
    await stage.stopping()
    terminal.type(CTRL_C)
    assert await terminal.ends() == shell.OK
    stage.model.open()
    await stage.idle()


async def test_what_was_said_is_sent_along_and_forgotten_by_new() -> None:
    async with recording() as (url, messages), in_terminal("chat", "--system", "be kind", WSSERVER_URL=url) as terminal:
        for line in ("one", "two", "/new", "three"):
            await terminal.shows(PROMPT)
            terminal.type(line + "\r")
        await terminal.shows(PROMPT)
        terminal.type(CTRL_D)
        assert await terminal.ends() == shell.OK
    assert [[each["content"] for each in message["messages"]] for message in messages[1:]] == [
        ["be kind", "one"],
        ["be kind", "one", "", "two"],
        ["be kind", "three"],
    ]


async def test_what_the_server_refuses_is_told_and_the_chat_goes_on_without_it(stage: Stage) -> None:
    async with in_terminal("chat", "--temperature", "11", WSSERVER_URL=stage.url) as terminal:
        await terminal.shows(PROMPT)
        terminal.type("hello\r")
        await terminal.shows("[bad_message: $.temperature: expected `float` <= 10.0]")
        await terminal.shows(PROMPT)
        terminal.type("/model nobody/knows\r")
        await terminal.shows("[model_not_found: ")
        await terminal.shows(PROMPT)
        terminal.type(CTRL_D)
        assert await terminal.ends() == shell.OK


async def test_models_are_listed_and_changed_and_the_prompt_says_who_answers(stage: Stage, terminal: PseudoTerminal) -> None:
    more = put(stage.server.models, MORE)
    more.load_gate.shut()
    more.step_gate.open()
    await terminal.shows("wsserver/echo")
    terminal.type("/model\r")
    await terminal.shows(f"{MORE}\r\n")
    await terminal.shows(PROMPT)
    terminal.type(f"/model {MORE}\r")
    await terminal.shows("loading test/more: config [....")
    more.load_gate.open()
    await terminal.shows(PROMPT)
    await terminal.shows(MORE)
    terminal.type("hello\r")
    await terminal.shows("hello\r\n[6 tokens")
    assert stage.model.steps == []


async def test_a_load_is_stopped_by_ctrl_c_too(stage: Stage, terminal: PseudoTerminal) -> None:
    more = put(stage.server.models, MORE)
    more.load_gate.shut()
    terminal.type(f"/model {MORE}\r")
    await terminal.shows("loading test/more")
    terminal.type(CTRL_C)
    await terminal.shows("[cancelled: ")
    await terminal.shows(PROMPT)
    more.load_gate.open()
    await eventually(more.load_gave_up.is_set)


async def test_help_and_an_empty_line(terminal: PseudoTerminal) -> None:
    terminal.type("\r")
    await terminal.shows(PROMPT)
    terminal.type("/help\r")
    await terminal.shows("/new begins another conversation")


async def test_cut_in_the_middle_the_answer_goes_on_and_a_lost_connection_is_shown_at_the_prompt_too(
    stage: Stage, terminal: PseudoTerminal
) -> None:
    terminal.type(TEXT + "\r")
    stage.model.step_gate.let(3)
    await terminal.shows(BEGUN)
    for link in list(stage.proxy.links.values()):
        link.cut()
    await terminal.shows("the connection is lost, trying again")
    stage.model.open()
    await terminal.shows(TEXT[4:])
    await terminal.shows(PROMPT)
    await stage.server.server.__aexit__(None, None, None)
    await terminal.shows("reconnecting")
    terminal.type(CTRL_D)
    assert await terminal.ends() == shell.OK


async def test_what_keeps_it_from_beginning_is_told_in_one_line(stage: Stage) -> None:
    async with in_terminal("chat", "--url", "ws://127.0.0.1:1/ws") as terminal:
        await terminal.shows("wsserver chat: the server cannot be reached: ")
        assert await terminal.ends() == shell.NO_CONNECTION
    async with in_terminal("chat", "--model", "nobody/knows", WSSERVER_URL=stage.url) as terminal:
        await terminal.shows("wsserver chat: model_not_found: ")
        assert await terminal.ends() == shell.REFUSED


def test_without_a_terminal_another_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chat.main([])
    assert ended.value.code == shell.USAGE
    assert "a chat needs a terminal; `wsserver ask` does without" in capsys.readouterr().err
