"""`wsserver mqtt ask` as its user runs it, and its printing where tokens were lost."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.mosquitto import ROOT, Mosquitto, needs_mosquitto, serving
from tests.test_mqtt_security import KEYS, Secured, face_at
from wsserver.auth import Keys
from wsserver_mqtt.ask import Failed, _print, main
from wsserver_mqtt.broker import Broker
from wsserver_mqtt.messages import Arrived

REPOSITORY = Path(__file__).parent.parent


async def started(url: str, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "wsserver", "mqtt", "ask", "--mqtt-root", ROOT, "--mqtt-url", url, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
        env=os.environ | environment,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    printed, said = await process.communicate()
    assert b"Traceback" not in said
    return process.returncode, printed.decode(), said.decode()


@needs_mosquitto
async def test_the_answer_is_printed(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _):
        model.open()
        process = await started(broker.url, "--raw", "Once", "upon a time")
        assert await ended(process) == (0, "Once upon a time\n", "")


@needs_mosquitto
async def test_a_question_is_a_conversation_unless_it_is_raw(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _):
        model.open()
        code, printed, _ = await ended(await started(broker.url, "Who are you?", "--temperature", "0"))
        assert (code, printed.strip()) == (0, "Who are you?")


@needs_mosquitto
async def test_a_refusal_is_told(broker: Mosquitto) -> None:
    async with serving(broker):
        code, printed, said = await ended(await started(broker.url, "hello", "--temperature", "-1"))
        assert (code, printed) == (1, "")
        assert said == "wsserver mqtt ask: $.temperature: expected `float` >= 0.0\n"


@needs_mosquitto
async def test_that_nobody_listens_is_told_at_once(broker: Mosquitto) -> None:
    said = f"wsserver mqtt ask: no server listens at {ROOT}/request\n"
    assert await ended(await started(broker.url, "hello")) == (3, "", said)


@needs_mosquitto
async def test_a_broker_that_is_not_there_is_told(broker: Mosquitto) -> None:
    await broker.stop()
    code, printed, said = await ended(await started(broker.url, "hello"))
    assert (code, printed) == (3, "")
    assert "the broker cannot be reached" in said


@needs_mosquitto
async def test_an_interrupt_stops_the_generation(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _):
        process = await started(broker.url, "--raw", "hello")
        model.step_gate.let(1)
        assert process.stdout
        assert await process.stdout.read(1) == b"h"
        process.send_signal(signal.SIGINT)
        code, _, said = await ended(process)
        assert (code, said) == (130, "")
        model.open()
        await model.freed_of("ask")
        assert len(model.steps) <= 3


@needs_mosquitto
async def test_the_servers_key_is_shown(broker: Mosquitto) -> None:
    async with serving(broker, Keys(KEYS)) as (_, model, _):
        model.open()
        code, _, said = await ended(await started(broker.url, "--raw", "hello"))
        assert (code, "key" in said) == (1, True)
        process = await started(broker.url, "--raw", "hello", WSSERVER_API_KEY="alice's key")
        assert await ended(process) == (0, "hello\n", "")


@needs_mosquitto
async def test_who_has_a_name_asks_in_it(tmp_path: Path) -> None:
    broker = Secured(tmp_path)
    await broker.start()
    try:
        async with face_at(f"mqtt://wsserver@127.0.0.1:{broker.port}", "wsserver's") as (model, face):
            await face.listening.wait()
            model.open()
            url, password = f"mqtts://alice@localhost:{broker.tls_port}", {"WSSERVER_MQTT_PASSWORD": "alice's"}
            process = await started(url, "--raw", "hello", "--mqtt-ca", broker.ca, **password)
            assert await ended(process) == (0, "hello\n", "")
            process = await started(url, "hello", "--mqtt-ca", broker.ca, "--mqtt-root", "elsewhere/root", **password)
            code, _, said = await ended(process)
            assert (code, "does not let you ask" in said) == (1, True)
    finally:
        await broker.stop()


def test_a_command_line_that_is_wrong_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["ask"], ["sing", "a song"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments, {})
        assert ended.value.code == 2
    assert main(["ask", "hello", "--mqtt-url", "http://x"], {}) == 2
    assert main(["ask", "hello", "--mqtt-root", "a/#"], {}) == 2
    assert "--mqtt-root" in capsys.readouterr().err


class Delivered:
    """Stands for a broker that delivers these frames."""

    def __init__(self, *frames: dict[str, Any]) -> None:
        self._frames = frames

    async def arrivals(self) -> AsyncIterator[Arrived]:
        for frame in self._frames:
            yield Arrived("topic", json.dumps(frame).encode())


async def printed(*frames: dict[str, Any]) -> int:
    return await _print(cast(Broker, Delivered(*frames)))


def token(seq: int, text: str) -> dict[str, Any]:
    return {"type": "token", "id": "ask", "seq": seq, "n": 1, "text": text}


async def test_what_was_lost_is_printed_with_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    done = {"type": "done", "id": "ask", "finish_reason": "stop", "text": "abcd"}
    assert await printed({"type": "started"}, token(0, "a"), token(2, "c"), token(3, "d"), done) == 0
    assert capsys.readouterr().out == "abcd\n"


@pytest.mark.parametrize(
    ("frame", "status"),
    [
        ({"type": "done", "finish_reason": "timeout", "text": "a"}, 4),
        ({"type": "done", "finish_reason": "error", "error": {"message": "why"}}, 1),
        ({"type": "error", "message": "why"}, 1),
    ],
)
async def test_an_answer_without_its_end_is_told(frame: dict[str, Any], status: int) -> None:
    with pytest.raises(Failed) as failed:
        await printed(token(0, "a"), frame)
    assert failed.value.status == status
