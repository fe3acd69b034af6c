"""What is written of MQTT is so: the lines of the README work as printed, examples too, tables agree with the code."""

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml

from LLM.model import Event
from tests.conftest import PATIENCE, eventually
from tests.mosquitto import OPEN, Mosquitto, mosquitto, needs_mosquitto, serving
from tests.test_main import process
from wsserver import protocol
from wsserver.protocol import ServerMessage
from wsserver_mqtt import back_off, broker, bulletin, reply
from wsserver_mqtt.topics import Topics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENT = (ROOT / "docs/mqtt.md").read_text()
EXAMPLES = ROOT / "examples"
HOME = Topics("llm/home")
needs_clients = pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="needs mosquitto-clients")


@pytest.fixture
async def at_home(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    async with mosquitto(tmp_path, [*OPEN, "log_type all"]) as running:
        yield running


def block(text: str, heading: str) -> str:
    """Give the shell lines that stand first below a heading."""
    found = re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def lines(side: str) -> list[str]:
    blocks = re.findall(rf"^```json {side}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


# The lines of the README.


def test_the_document_begins_as_the_readme_does() -> None:
    assert block(README, "Over MQTT") == block(DOCUMENT, "Start")


@needs_mosquitto
@needs_clients
@pytest.mark.usefixtures("default_model_folder")
@pytest.mark.timeout(300)  # the default model is loaded, beside whatever else runs
async def test_the_lines_in_the_readme_work_as_printed(at_home: Mosquitto, tmp_path: Path) -> None:
    serve, subscribe, publish = block(README, "Over MQTT").splitlines()
    # But for the ports, which are free ones here, and the checkout's interpreter.
    serve = serve.replace(".venv/bin/wsserver", f"{sys.executable} -m wsserver --port 0")
    serve = serve.replace("mqtt://127.0.0.1", at_home.url)
    clients = [line.replace(" -t ", f" -p {at_home.port} -t ", 1) for line in (subscribe, publish)]
    async with process(tmp_path, "sh", "-c", f"exec {serve}") as server:
        await server.says()
        frames = await heard_of(clients, at_home)
        assert frames[0]["type"] == "started"
        assert frames[-1]["text"].startswith(" Paris")
        server.signal()
        assert await server.ends() == 0


async def heard_of(lines: list[str], at: Mosquitto) -> list[dict[str, Any]]:
    """Give what the first line hears of what the second one publishes."""
    subscribe, publish = lines
    heard = await asyncio.create_subprocess_shell(f"exec {subscribe}", stdout=asyncio.subprocess.PIPE)
    frames: list[dict[str, Any]] = []
    try:
        await eventually(lambda: "llm/home/reply/me" in at.log)
        published = await asyncio.create_subprocess_shell(publish)
        assert await published.wait() == 0
        assert heard.stdout
        async with asyncio.timeout(PATIENCE):
            while not frames or frames[-1]["type"] != "done":
                frames.append(json.loads(await heard.stdout.readline()))
    finally:
        heard.kill()
        await heard.wait()
    return frames


# Examples.


@needs_mosquitto
async def test_the_python_example_prints_the_answer(at_home: Mosquitto) -> None:
    async with serving(at_home, topics=HOME) as (_, model, _):
        model.open()
        assert await printed_by_example(at_home) == "Once upon a time\n[stop after 17 tokens]\n"


@needs_mosquitto
async def test_the_python_example_prints_the_whole_answer_though_the_broker_went_meanwhile(at_home: Mosquitto) -> None:
    async with serving(at_home, topics=HOME) as (_, model, face):
        example = asyncio.create_task(printed_by_example(at_home))
        model.step_gate.let(2)
        await model.in_step(3)
        await at_home.stop()
        model.open()
        await at_home.start()
        await face.listening.wait()
        assert await example == "Once upon a time\n[stop after 17 tokens]\n"
        assert len(model.steps) == 17


async def printed_by_example(at: Mosquitto) -> str:
    command = [sys.executable, str(EXAMPLES / "mqtt_ask.py"), "127.0.0.1", str(at.port)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=os.environ)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


def test_the_home_assistant_example_asks_and_hears_at_topics_that_there_are() -> None:
    config = yaml.safe_load((EXAMPLES / "home_assistant.yaml").read_text())
    action = config["script"]["ask_llm"]["sequence"][0]["data"]
    payload = action["payload"].removeprefix("{{").removesuffix("| tojson }}").replace("question", '"Why?"', 1)
    message = json.loads(payload)
    assert isinstance(protocol.decode(json.dumps(message)), protocol.Generate)
    assert (action["topic"], HOME.allows(message["reply_to"], "")) == (HOME.request, True)
    sensors = config["mqtt"]["sensor"] + config["mqtt"]["binary_sensor"]
    assert {sensor["state_topic"] for sensor in sensors} == {HOME.status, message["reply_to"]}
    assert config["mqtt"]["binary_sensor"][0]["payload_on"] == "online"


# The document.


@pytest.mark.parametrize("line", lines("client"))
def test_a_request_in_the_document_is_a_message_the_server_takes(line: str) -> None:
    message = protocol.decode(line)
    assert HOME.allows(json.loads(line)["reply_to"], "")
    known = {field.name for field in msgspec.structs.fields(message)}
    assert set(json.loads(line)) - {"type", "reply_to", "token"} <= known


@pytest.mark.parametrize("line", lines("server"))
def test_an_answer_in_the_document_is_a_frame_the_server_sends(line: str) -> None:
    frame = msgspec.convert(json.loads(line), ServerMessage, str_keys=True)
    assert json.loads(protocol.encode(frame)) == json.loads(line)


def test_the_state_in_the_document_is_told_like_that() -> None:
    online, offline, event = map(json.loads, lines("state"))
    overview = {"server": protocol.ServerInfo(**online["server"]), "models": online["models"], "available": []}
    told = bulletin.Bulletin(HOME, lambda: overview)
    told.event(event["event"], event["model"])
    happened, state = told.due(0.0)
    assert json.loads(happened.payload) == event
    assert json.loads(state.payload) == online | {"available": []}
    assert json.loads(told.offline.payload) == offline
    assert all(f"`{name}`" in DOCUMENT for name in get_args(Event))


def test_the_table_of_what_may_be_lost_is_that_of_the_code() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCUMENT.splitlines() if "| 0 |" in line]
    [(lost, *_)] = rows
    names = {kind.__struct_config__.tag for kind in reply.MAY_BE_LOST}
    assert set(re.findall(r"`(\w+)`", lost)) == names
    [(kept, *_)] = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT.splitlines()
        if line.startswith("| `done`")
    ]
    others = {kind.__struct_config__.tag for kind in get_args(ServerMessage)} - names
    assert set(re.findall(r"`(\w+)`", kept)) == others


def test_the_topics_and_times_in_the_document_are_those_of_the_code() -> None:
    table = DOCUMENT[DOCUMENT.index("| topic, below the root |") :].split("\n\n")[0]
    told = set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))
    assert told == {"request", "cancel", "reply", "status", "events"}
    assert f"every {bulletin.REFRESH:g} seconds" in DOCUMENT
    assert f"vanished after {1.5 * broker.KEEPALIVE:g} seconds" in DOCUMENT
    assert f"given up after {2 * broker.KEEPALIVE} seconds" in DOCUMENT
    assert f"longer by {broker.ROOM_FOR_PROPERTIES // 1024} KiB" in DOCUMENT
    assert (back_off.FIRST, f"up to {back_off.LONGEST:g} s" in DOCUMENT) == (0.5, True)


def test_links_in_the_document_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)", DOCUMENT)) <= headings
