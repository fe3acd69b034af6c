"""`websocat` against a server process with the default model, as at a terminal: JSON lines in, JSON lines out."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checker import Checker
from tests.conftest import DEFAULT_MODEL

ROOT = Path(__file__).parent.parent
WEBSOCAT = Path(sys.executable).parent / "websocat"
QUESTION = '{"type":"generate","prompt":"The capital of France is","temperature":0,"max_tokens":8}'
LONG: dict[str, Any] = {"prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 4000}


class Terminal:
    """A websocat with its pipes; every line it prints passes the checker."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.checker = Checker()

    def type(self, line: str) -> None:
        assert self.process.stdin
        with contextlib.suppress(json.JSONDecodeError):
            self.checker.sent(json.loads(line))
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def send(self, **message: Any) -> None:
        self.type(json.dumps(message))

    def end_of_input(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "websocat ended"
        return self.checker.received(line)

    def until(self, kind: str, id: str | None = None) -> dict[str, Any]:
        while (frame := self.read())["type"] != kind or id not in (None, frame.get("id")):
            pass
        return frame


@contextlib.contextmanager
def websocat(*arguments: str) -> Iterator[Terminal]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with subprocess.Popen([WEBSOCAT, *arguments], **pipes) as process:
        try:
            yield Terminal(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(default_model_folder: Path) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "wsserver",
        "--port",
        "0",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--drain-timeout",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout
            line = server.stdout.readline()
            assert line.startswith(f"serving {DEFAULT_MODEL} (float32 on cpu) at ws://127.0.0.1:")
            yield line.split()[-1]
            server.send_signal(signal.SIGTERM)
            assert server.wait() == 0
        finally:
            server.kill()


def test_one_piped_line_is_answered_though_the_pipe_ends(url: str):
    with websocat("-n", url) as terminal:
        terminal.type(QUESTION)
        terminal.end_of_input()
        assert terminal.read()["type"] == "started"
        done = terminal.until("done")
        assert (done["finish_reason"], done["usage"]["completion_tokens"]) == ("length", 8)
        assert "Paris" in terminal.checker.texts[done["id"]]


def test_with_once_it_ends_by_itself_when_the_answer_has_come(url: str):
    with websocat("-n", f"{url}?once=1") as terminal:
        terminal.type(QUESTION)
        terminal.end_of_input()
        assert terminal.until("done")["finish_reason"] == "length"
        assert terminal.process.stdout
        assert terminal.process.stdout.read() == ""
        assert terminal.process.wait() == 0


def test_a_long_generation_is_stopped_in_mid_stream_and_the_next_one_answered_on_the_same_connection(url: str):
    with websocat(url) as terminal:
        terminal.send(type="generate", id="story", **LONG)
        for _ in range(3):
            terminal.until("token", "story")
        terminal.send(type="cancel", id="story")
        done = terminal.until("done", "story")
        assert done["finish_reason"] == "cancelled"
        assert 3 <= done["usage"]["completion_tokens"] < 1000
        assert "cancel_ms" in done["timings"]
        terminal.type(QUESTION)
        assert terminal.until("done")["finish_reason"] == "length"
        terminal.send(type="cancel", id="story")
        assert terminal.until("error")["code"] == "not_active"


def test_a_long_prompt_is_stopped_before_its_first_token(url: str):
    with websocat(url) as terminal:
        terminal.send(type="generate", id="book", prompt="word " * 6000, max_tokens=1)
        assert terminal.until("started")["prompt_tokens"] >= 6000
        terminal.send(type="cancel")
        done = terminal.until("done", "book")
        assert (done["finish_reason"], done["usage"]["completion_tokens"]) == ("cancelled", 0)


def test_several_lines_at_once_are_all_answered_and_status_meanwhile(url: str):
    with websocat("--protocol", "llmstream.v1", url) as terminal:
        for id in ("a", "b", "ü😀"):
            terminal.send(type="generate", id=id, messages=[{"role": "user", "content": f"Say {id}"}], max_tokens=5)
        terminal.send(type="status")
        assert set(terminal.until("status")["connection"]["active"]) == {"a", "b", "ü😀"}
        while len(terminal.checker.dones) < 3:
            terminal.until("done")
        assert all(terminal.checker.texts[id] for id in ("a", "b", "ü😀"))


def test_a_mistyped_line_is_answered_and_the_running_generation_goes_on(url: str):
    with websocat(url) as terminal:
        terminal.send(type="generate", id="g", prompt="Hello", max_tokens=6, ignore_eos=True)
        terminal.type("hello?")
        assert terminal.until("error")["code"] == "bad_json"
        terminal.type("{'type': 'status'}")
        assert terminal.until("error")["code"] == "bad_json"
        assert terminal.until("done", "g")["finish_reason"] == "length"


def test_the_end_of_the_pipe_closes_the_connection_and_stops_what_it_ran(url: str):
    with websocat(url) as leaving:
        leaving.send(type="generate", id="story", **LONG)
        leaving.until("token")
        leaving.end_of_input()
        assert leaving.process.wait() == 0
    with websocat(url) as terminal:
        active = 1
        while active:
            terminal.send(type="status")
            (model,) = terminal.until("status")["models"]
            active = model["active"] + model["queued"]
