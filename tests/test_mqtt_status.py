"""What everybody on the broker is told: the state that is retained, the will, and events."""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiomqtt
import orjson
import pytest

from LLM.errors import Refused
from LLM.model import Waiter
from tests.conftest import ECHO, PATIENCE
from tests.mosquitto import ROOT, Mosquitto, device, needs_mosquitto, serving
from tests.scripted import put
from tests.test_main import COMMAND, ON_ECHO, process
from wsserver.protocol import ServerInfo
from wsserver_mqtt.bulletin import MAX_EVENTS, REFRESH, Bulletin
from wsserver_mqtt.topics import Topics


class Listener:
    """Hears what is told at one topic."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self._client = client

    async def until(self, **fields: Any) -> dict[str, Any]:
        """Read on until something is told that has these fields."""
        async with asyncio.timeout(PATIENCE):
            async for message in self._client.messages:
                told: dict[str, Any] = orjson.loads(message.payload)  # type: ignore[arg-type]
                if fields.items() <= told.items():
                    return told
        raise AssertionError("nothing more is told")


@contextlib.asynccontextmanager
async def listener(broker: Mosquitto, topic: str) -> AsyncIterator[Listener]:
    async with aiomqtt.Client("127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe(topic, qos=1)
        yield Listener(client)


# The state.


@needs_mosquitto
async def test_the_state_is_retained_and_says_what_a_status_says(broker: Mosquitto) -> None:
    async with serving(broker) as (_, _, _), device(broker) as client:
        report = await client.settle()
        async with listener(broker, f"{ROOT}/status") as hearing:
            state = await hearing.until(state="online")
        assert state.keys() == {"type", "state", "server", "models", "available", "load"}
        assert state["type"] == "status"
        assert (state["models"], state["available"]) == (report["models"], report["available"])
        assert (state["load"], state["server"]["draining"]) == ({"active": 0, "queued": 0}, False)


@needs_mosquitto
async def test_the_state_is_told_anew_when_somebody_begins_to_run(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client, listener(broker, f"{ROOT}/status") as hearing:
        await hearing.until(load={"active": 0, "queued": 0})
        await client.send(type="generate", id="g", prompt="hello")
        await hearing.until(load={"active": 1, "queued": 0})
        model.open()
        state = await hearing.until(load={"active": 0, "queued": 0})
        assert state["models"][0]["steps"] == 6


@needs_mosquitto
async def test_a_server_that_ends_says_so(broker: Mosquitto) -> None:
    async with listener(broker, f"{ROOT}/status") as hearing:
        async with serving(broker):
            await hearing.until(state="online")
        await hearing.until(type="status", state="offline")
    async with listener(broker, f"{ROOT}/status") as hearing:
        await hearing.until(state="offline")


@needs_mosquitto
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_server_that_was_ended_by_a_signal_is_offline(broker: Mosquitto, tmp_path: Path, how: int) -> None:
    async with listener(broker, f"{ROOT}/status") as hearing:
        options = ["--mqtt-url", broker.url, "--mqtt-root", ROOT]
        async with process(tmp_path, *COMMAND, *ON_ECHO, *options) as server:
            await hearing.until(state="online")
            server.signal(how)
            await hearing.until(state="offline")
            assert await server.ends() == (0 if how == signal.SIGTERM else -how)
            assert "Traceback" not in server.stderr


@needs_mosquitto
async def test_a_drain_is_told_and_lets_answers_come_to_their_end(broker: Mosquitto) -> None:
    async with serving(broker, drain_timeout=60) as (server, model, _), device(broker) as client:
        await client.send(type="generate", id="g", prompt="hello")
        await client.until("started")
        drain = asyncio.create_task(server.server.drain())
        goaway = await client.until("goaway")
        assert 50_000 < goaway["deadline_ms"] <= 55_000
        async with listener(broker, f"{ROOT}/status") as hearing:
            while not (await hearing.until(state="online"))["server"]["draining"]:
                pass
        await client.send(type="generate", id="late", prompt="hello")
        assert (await client.until("done"))["error"]["code"] == "shutting_down"
        model.open()
        assert (await client.until("done"))["finish_reason"] == "stop"
        await drain


@needs_mosquitto
async def test_what_a_drain_cuts_off_is_told_so(broker: Mosquitto) -> None:
    async with serving(broker, drain_timeout=0) as (server, model, _), device(broker) as client:
        await client.send(type="generate", id="g", prompt="hello")
        model.step_gate.let(1)
        await client.until("token")
        drain = asyncio.create_task(server.server.drain())
        await client.until("goaway")
        model.open()
        done = await client.until("done")
        assert (done["finish_reason"], done["text"][:1]) == ("shutdown", "h")
        await drain


# Events.


@needs_mosquitto
async def test_loads_and_their_failures_are_told(broker: Mosquitto) -> None:
    async with serving(broker) as (server, _, _), listener(broker, f"{ROOT}/events") as hearing:
        put(server.models, "test/good").open()
        put(server.models, "test/broken").load_errors.append(ValueError("broken"))
        await server.models.get(server.models.resolve("test/good"), Waiter())
        told = [await hearing.until(type="event", model="test/good") for _ in range(2)]
        assert [event["event"] for event in told] == ["loading", "ready"]
        with pytest.raises(Refused):
            await server.models.get(server.models.resolve("test/broken"), Waiter())
        told = [await hearing.until(type="event", model="test/broken") for _ in range(2)]
        assert [event["event"] for event in told] == ["loading", "load_failed"]


@needs_mosquitto
async def test_a_model_that_dies_is_told(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client, listener(broker, f"{ROOT}/events") as hearing:
        model.step_errors = {1: SystemExit("died")}
        model.open()
        assert (await client.generate(id="g", prompt="hello"))["finish_reason"] == "error"
        assert (await hearing.until(event="died"))["model"] == ECHO


# When what is told: pure.


def told(state: dict[str, Any], active: int, steps: int) -> None:
    entry = {"id": "m", "state": "ready", "active": active, "queued": 0, "steps": steps}
    state.update(server=ServerInfo(version="1", uptime_s=1.0, draining=False), models=[entry], available=["m"])


def test_a_state_is_told_when_it_changes_and_after_a_while_because_its_counts_go_on() -> None:
    state: dict[str, Any] = {}
    bulletin = Bulletin(Topics("llm/x"), lambda: state)
    told(state, 0, 0)
    assert len(bulletin.due(0.0)) == 1
    told(state, 0, 7)
    assert bulletin.due(1.0) == []
    told(state, 1, 8)
    [message] = bulletin.due(2.0)
    assert (message.topic, message.retain, message.qos) == ("llm/x/status", True, 1)
    assert orjson.loads(message.payload)["load"] == {"active": 1, "queued": 0}
    assert bulletin.due(2.0 + REFRESH - 0.1) == []
    told(state, 1, 9)
    [message] = bulletin.due(2.0 + REFRESH)
    assert orjson.loads(message.payload)["models"][0]["steps"] == 9
    bulletin.start_anew()
    assert len(bulletin.due(2.0 + REFRESH)) == 1


def test_events_that_nobody_could_be_told_are_bounded() -> None:
    state: dict[str, Any] = {}
    told(state, 0, 0)
    bulletin = Bulletin(Topics("llm/x"), lambda: state)
    for number in range(MAX_EVENTS + 5):
        bulletin.event("ready", f"model-{number}")
    *events, status = bulletin.due(0.0)
    assert len(events) == MAX_EVENTS
    assert re.search(b'"model-5"', events[0].payload)
    assert status.retain
    assert bulletin.due(0.0) == []
