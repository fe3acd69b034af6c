"""`wsserver ask` as a shell sees it: a process, its pipes, its signals and its exit status."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve

from tests.conftest import eventually
from tests.pseudo_terminal import ENVIRONMENT, in_terminal
from tests.scripted import in_engine, put, scripted
from tests.stage import MORE, TEXT, Stage, staged
from tests.test_dialing import answering
from tests.test_docs import README
from wsserver import __main__ as main_module
from wsserver import ask, shell

COMMAND = (sys.executable, "-m", "wsserver", "ask")
ANSWERS: dict[str, dict[str, Any]] = {
    "init": {
        "type": "ready",
        "protocol": 1,
        "server": "0",
        "session": "s",
        "model": {"id": "m", "context_length": 1, "dtype": "", "quantization": "", "device": ""},
        "limits": {"max_message_bytes": 1, "max_active": 1},
    },
    "generate": {
        "type": "done",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 0, "cached_tokens": 0},
        "timings": {"total_ms": 1.0},
    },
}


@contextlib.asynccontextmanager
async def asking(
    url: str, *arguments: str, piped: bytes | None = b"", **more: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the command; what is `piped` in ends there, and None leaves the pipe open."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | ENVIRONMENT | {"WSSERVER_URL": url} | more,
    )
    try:
        if piped is not None and process.stdin:
            process.stdin.write(piped)
            process.stdin.close()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def recording() -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Serve answers with nothing in them; give the address, and the messages there were."""
    messages: list[dict[str, Any]] = []

    async def answer(client: ServerConnection) -> None:
        async for data in client:
            messages.append(orjson.loads(data))
            await client.send(orjson.dumps(ANSWERS[messages[-1]["type"]] | {"id": messages[-1]["id"]}), text=True)

    async with serve(answer, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws", messages


async def outcome(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    """Wait for the end; give the exit status, and what it said from now on."""
    assert process.stdout
    assert process.stderr
    async with asyncio.timeout(60):
        said, told = await asyncio.gather(process.stdout.read(), process.stderr.read())
        return await process.wait(), said.decode(), told.decode()


async def asked(url: str, *arguments: str, piped: bytes = b"", **more: str) -> tuple[int, str, str]:
    async with asking(url, *arguments, piped=piped, **more) as process:
        return await outcome(process)


# Asking.


async def test_tokens_are_printed_as_they_come_and_nothing_else(stage: Stage) -> None:
    async with asking(stage.url, "hello") as process:
        assert process.stdout
        for letter in b"hello":
            stage.model.step_gate.let(1)
            assert await process.stdout.readexactly(1) == bytes([letter])
        stage.model.open()
        assert await outcome(process) == (shell.OK, "\n", "")


@pytest.mark.parametrize(
    ("words", "piped", "printed"),
    [
        (["hello", "world"], b"", "hello world\n"),
        ([], b"from a file\n", "from a file\n"),
        (["what?"], b"from a file\n", "what?\n\nfrom a file\n"),
        (["ž"], b"\xff.", "ž\n\n\N{REPLACEMENT CHARACTER}.\n"),
    ],
)
async def test_words_and_what_is_piped_in_are_asked(stage: Stage, words: list[str], piped: bytes, printed: str) -> None:
    stage.model.open()
    assert await asked(stage.url, *words, piped=piped) == (shell.OK, printed, "")


async def test_options_say_how_to_answer(stage: Stage) -> None:
    stage.model.open()
    put(stage.server.models, MORE).open()
    options = ("--raw", "--max-tokens", "3", "--temperature", "0", "--seed", "1", "--model", MORE, "--url", stage.url)
    assert await asked("ws://127.0.0.1:1/ws", *options, "hello") == (shell.OK, "hel\n", "")
    assert stage.model.steps == []


async def test_a_system_message_comes_first() -> None:
    async with recording() as (url, messages):
        assert await asked(url, "--system", "be kind", "hello") == (shell.OK, "", "")
    assert [message["type"] for message in messages] == ["init", "generate"]
    assert messages[1]["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert messages[1]["resumable"] is True


async def test_the_key_comes_from_the_environment_or_the_command_line() -> None:
    async with answering(401, "this key is unknown") as (url, requests):
        refused = (shell.REFUSED, "", "wsserver ask: unauthenticated: this key is unknown\n")
        assert await asked(url, "hi", WSSERVER_API_KEY="sk-1") == refused
        assert await asked(url, "--key", "sk-2", "hi", WSSERVER_API_KEY="sk-1") == refused
        assert [request.headers["Authorization"] for request in requests] == ["Bearer sk-1", "Bearer sk-2"]


async def test_cut_in_the_middle_the_answer_comes_whole(stage: Stage) -> None:
    async with asking(stage.url, TEXT) as process:
        assert process.stdout
        stage.model.step_gate.let(7)
        begun = await process.stdout.readexactly(3)
        (link,) = stage.proxy.links.values()
        link.cut()
        stage.model.open()
        status, rest, told = await outcome(process)
        assert (status, begun.decode() + rest, told) == (shell.OK, TEXT + "\n", "")


# How it ends.


async def test_an_answer_that_reached_its_length_is_an_answer(stage: Stage) -> None:
    stage.model.open()
    assert await asked(stage.url, "hello", "--max-tokens", "2") == (shell.OK, "he\n", "")


@pytest.mark.parametrize("arguments", [[], ["  "], ["hi", "--max-tokens", "many"], ["hi", "--no-such-option"]])
async def test_a_bad_command_line_is_told_with_the_usage(arguments: list[str]) -> None:
    status, printed, told = await asked("ws://127.0.0.1:1/ws", *arguments)
    assert (status, printed) == (shell.USAGE, "")
    assert told.startswith("usage: wsserver ask")


async def test_what_the_server_refuses_is_told_in_one_line(stage: Stage) -> None:
    status, printed, told = await asked(stage.url, "hi", "--temperature", "11")
    assert (status, printed) == (shell.REFUSED, "")
    assert told == "wsserver ask: bad_message: $.temperature: expected `float` <= 10.0\n"
    status, printed, told = await asked(stage.url, "hi", "--model", "nobody/knows")
    assert (status, printed) == (shell.REFUSED, "")
    assert told.startswith("wsserver ask: model_not_found: ")


async def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    status, printed, told = await asked(f"ws://127.0.0.1:{port}/ws", "hi")
    assert (status, printed) == (shell.NO_CONNECTION, "")
    assert told.startswith("wsserver ask: the server cannot be reached: ")
    assert told.count("\n") == 1
    status, _, told = await asked("localhost", "hi")
    assert (status, told) == (
        shell.NO_CONNECTION,
        "wsserver ask: localhost: localhost isn't a valid URI: scheme isn't ws or wss\n",
    )


async def test_an_answer_that_the_server_cuts_off_is_told(stage: Stage) -> None:
    async with scripted(drain_timeout=0.0) as (server, model), asking(server.url, TEXT) as process:
        assert process.stdout
        model.step_gate.let(3)
        assert await process.stdout.readexactly(3) == b"012"
        drain = asyncio.create_task(server.server.drain())
        await eventually(lambda: all(job.stopping for job in server.server.resumables))
        model.open()
        assert await outcome(process) == (shell.CUT_OFF, "\n", "wsserver ask: the answer was cut off: shutdown\n")
        await drain


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, shell.INTERRUPTED), (signal.SIGTERM, shell.TERMINATED)])
async def test_a_signal_stops_the_answer_and_keeps_what_there_was(stage: Stage, number: int, status: int) -> None:
    async with asking(stage.url, TEXT) as process:
        assert process.stdout
        stage.model.step_gate.let(3)
        assert await process.stdout.readexactly(3) == b"012"
        process.send_signal(number)
        assert await outcome(process) == (status, "\n", "")
        stage.model.step_gate.let(1)
        await stage.idle()


async def test_a_signal_ends_a_wait_for_a_load_and_cancels_it() -> None:
    async with staged(loaded=False) as stage:
        stage.model.load_gate.shut()
        async with asking(stage.url, TEXT) as process:
            await stage.model.in_load_stage(1)
            process.send_signal(signal.SIGINT)
            assert await outcome(process) == (shell.INTERRUPTED, "", "")
            stage.model.load_gate.open()
            await eventually(stage.model.load_gave_up.is_set)


async def test_a_pipe_that_nobody_reads_on_ends_it(stage: Stage) -> None:
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        TEXT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | ENVIRONMENT | {"WSSERVER_URL": stage.url},
    )
    os.close(writing)
    stream = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb")
    )
    stage.model.step_gate.let(3)
    assert await stream.readexactly(3) == b"012"
    pipe.close()
    await asyncio.sleep(0)  # for it is closed a moment later
    stage.model.step_gate.let(1)
    await eventually(lambda: process.returncode is not None, 60)
    stage.model.step_gate.let(1)
    assert process.stderr
    assert (process.returncode, await process.stderr.read()) == (shell.CLOSED_PIPE, b"")
    await stage.idle()


# In a terminal.


async def test_how_far_it_is_is_shown_on_a_terminal_and_wiped_away_before_the_text() -> None:
    async with staged(loaded=False, max_active=1) as stage, stage.connect() as neighbour:
        stage.model.load_gate.shut()
        async with in_terminal("ask", "hello", stderr_only=True, WSSERVER_URL=stage.url) as terminal:
            assert terminal.process.stdin
            terminal.process.stdin.close()
            await stage.model.in_load_stage(1)
            await terminal.shows("loading wsserver/echo: config [....................]   0%")
            stage.model.load_gate.let(1)
            await terminal.shows("loading wsserver/echo: weights [######..............]  33%")
            busy = asyncio.create_task(neighbour.generate(prompt=TEXT).text())
            await neighbour.status()
            stage.model.load_gate.open()
            await in_engine(stage.server, 2)
            stage.model.step_gate.let(1)
            await terminal.shows("waiting, number 1 in line")
            stage.model.open()
            await terminal.shows(shell.CLEAR)
            assert terminal.process.stdout
            assert await terminal.process.stdout.read() == b"hello\n"
            assert await terminal.ends() == shell.OK
            assert await busy == TEXT


async def test_a_lost_connection_is_shown_beside_the_text_and_not_over_it(stage: Stage) -> None:
    async with in_terminal("ask", TEXT, WSSERVER_URL=stage.url) as terminal:
        stage.model.step_gate.let(3)
        await terminal.shows("012")
        for link in list(stage.proxy.links.values()):
            link.cut()
        await terminal.shows("\nthe connection is lost, trying again")
        await terminal.shows(shell.CLEAR)
        stage.model.open()
        await terminal.shows(TEXT[4:] + "\r\n")
        assert await terminal.ends() == shell.OK


@pytest.mark.parametrize(
    ("share", "drawn"),
    [
        (0.0, "[....................]   0%"),
        (0.5, "[##########..........]  50%"),
        (1.0, f"[{'#' * 20}] 100%"),
        (1.1, f"[{'#' * 20}] 110%"),
    ],
)
def test_a_share_is_drawn(share: float, drawn: str) -> None:
    assert shell.bar(share) == drawn


# Starting.


async def test_it_starts_without_the_models_libraries_and_the_chats(stage: Stage) -> None:
    stage.model.open()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "importtime", "-m", "wsserver", "ask", "hi"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | ENVIRONMENT | {"WSSERVER_URL": stage.url},
    )
    status, printed, told = await outcome(process)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.splitlines()}
    assert (status, printed) == (shell.OK, "hi\n")
    assert "wsserver" in imported
    assert imported.isdisjoint({"torch", "transformers", "numpy", "prompt_toolkit", "rich", "huggingface_hub"})


def test_the_command_line_knows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["wsserver", "ask", "--help"])
    with pytest.raises(SystemExit) as ended:
        main_module.main()
    assert ended.value.code == 0
    assert "exit status:" in capsys.readouterr().out


def test_the_readme_and_the_help_tell_every_exit_status() -> None:
    table = set(
        re.findall(r"^\| ([0-9, ]+) \| ", README[README.index("| status |") : README.index("Both take")], re.MULTILINE)
    )
    told = {int(number) for cell in table for number in cell.split(", ")}
    assert told == {
        shell.OK,
        shell.REFUSED,
        shell.USAGE,
        shell.NO_CONNECTION,
        shell.CUT_OFF,
        shell.INTERRUPTED,
        shell.TERMINATED,
        shell.CLOSED_PIPE,
    }
    assert told == {int(number) for number in re.findall(r"(?:^  |; )([0-9]+)(?=:| )", ask.EPILOG, re.MULTILINE)}
