import logging
from typing import Any

import pytest

from tests.conftest import Client, eventually
from tests.scripted import STAGES, ScriptedModel, put, scripted
from wsserver import __version__

OTHER = "test/other"


async def init(client: Client, id: str, **fields: Any) -> dict[str, Any]:
    """Send an init; give the frame that answers it."""
    await client.send(type="init", id=id, **fields)
    return await client.until("ready", "error", id=id)


async def started_with(client: Client, id: str) -> str:
    await client.send(type="generate", id=id, prompt="hello")
    await client.done(id)
    return str(client.of(id, "started")[0]["model"])


async def test_an_init_loads_and_says_what_the_client_may_count_on() -> None:
    async with scripted(loaded=False, max_active=3) as (server, model), server.client() as client:
        ready = await init(client, "load")
        session = ready.pop("session")
        assert ready == {
            "type": "ready",
            "id": "load",
            "protocol": 1,
            "server": __version__,
            "model": {
                "id": "wsserver/echo",
                "context_length": 65536,
                "dtype": "none",
                "quantization": "none",
                "device": "cpu",
            },
            "limits": {"max_message_bytes": 262144, "max_active": 3},
        }
        assert session == (await client.settle())["connection"]["session"]
        loading = client.of("load", "loading")
        assert [frame["stage"] for frame in loading] == sorted({frame["stage"] for frame in loading}, key=STAGES.index)
        assert all(frame["model"] == "wsserver/echo" for frame in loading)
        assert model.loads == 1


async def test_every_stage_of_a_load_is_told_while_it_is_done() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as client:
        model.load_gate.shut()
        await client.send(type="init", id="load")
        for number, stage in enumerate(STAGES):
            loading = await client.until("loading")
            assert (loading["stage"], loading["progress"]) == (stage, round(number / 3, 3))
            model.load_gate.let()
        await client.until("ready")


async def test_an_init_without_id_gets_one(client: Client) -> None:
    await client.send(type="init")
    ready = await client.until("ready")
    assert ready["id"]
    assert {frame["id"] for frame in client.frames} == {ready["id"]}


async def test_a_loaded_model_is_ready_without_another_load() -> None:
    async with scripted() as (server, model), server.client() as client:
        assert (await init(client, "load"))["type"] == "ready"
        assert model.loads == 1
        assert not client.of("load", "loading")


async def test_an_init_switches_the_model_of_its_connection_only() -> None:
    async with scripted() as (server, model), server.client() as client, server.client() as bystander:
        put(server.models, OTHER).open()
        model.open()
        assert (await init(client, "load", model=OTHER))["model"]["id"] == OTHER
        assert await started_with(client, "g1") == OTHER
        assert await started_with(bystander, "g1") == "wsserver/echo"
        assert (await init(client, "back"))["model"]["id"] == "wsserver/echo"
        assert await started_with(client, "g2") == "wsserver/echo"


async def test_a_generation_goes_on_with_its_model_when_an_init_switches() -> None:
    async with scripted() as (server, model), server.client() as client:
        put(server.models, OTHER)
        await client.send(type="generate", id="g", prompt="hello")
        await model.in_step(1)
        await init(client, "load", model=OTHER)
        model.open()
        assert (await client.done("g"))["finish_reason"] == "stop"
        assert client.checker.texts["g"] == "hello"


NOT_LISTED = [
    *("../../etc", "..", "/etc/passwd", "wsserver/../wsserver/echo", "WSSERVER/ECHO", "wsserver/echo ", "wsserver/echo\0"),
    *("meta-llama/Llama-3.1-8B", "https://example.org/model", "model_srv_wsserver_echo", "\n\x1b[2J\u202e", "\x7f", " "),
]


@pytest.mark.parametrize("name", NOT_LISTED)
async def test_a_model_that_is_not_listed_is_not_found_and_the_previous_one_stays(name: str) -> None:
    async with scripted() as (server, model), server.client() as client:
        put(server.models, OTHER).open()
        await init(client, "load", model=OTHER)
        error = await init(client, "bad", model=name)
        assert error["code"] == "model_not_found"
        assert OTHER in error["message"]
        assert error["message"].isprintable()
        assert await started_with(client, "g") == OTHER
        assert not model.steps


async def test_two_clients_share_one_load_and_both_are_told() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as a, server.client() as b:
        model.load_gate.shut()
        await a.send(type="init", id="a")
        assert (await a.until("loading"))["stage"] == "config"
        await b.send(type="init", id="b")
        await b.settle()
        model.load_gate.let(1)
        for client in (a, b):
            assert (await client.until("loading"))["stage"] == "weights"
        model.load_gate.open()
        for client in (a, b):
            await client.until("ready")
        assert model.loads == 1


async def test_a_load_goes_on_for_the_one_who_stays() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as stays:
        model.load_gate.shut()
        async with server.client() as leaves:
            for client in (leaves, stays):
                await client.send(type="init", id="load")
                await client.settle()
            await model.in_load_stage(1)
        model.load_gate.open()
        await stays.until("ready")
        assert model.loads == 1


async def test_a_load_nobody_waits_for_is_given_up_and_a_later_init_loads_again() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as client:
        model.load_gate.shut()
        await client.send(type="init", id="load")
        await model.in_load_stage(1)
        await client.send(type="cancel", id="load")
        assert (await client.until("error"))["code"] == "cancelled"
        model.load_gate.let(1)
        await eventually(lambda: all(entry["state"] != "loading" for entry in server.models.status()))
        assert (model.loads, model.load_stages) == (1, 1)
        model.load_gate.open()
        assert (await init(client, "load"))["type"] == "ready"
        assert model.loads == 2


async def test_an_init_during_the_last_moments_of_an_abandoned_load_is_served() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as client:
        model.load_gate.shut()
        await client.send(type="init", id="load")
        await model.in_load_stage(1)
        await client.send(type="cancel", id="load")
        await client.until("error")
        model.load_gate.open()
        assert (await init(client, "load"))["type"] == "ready"


FAILURES = [OSError("/home/secret/model.safetensors"), AssertionError("/home/secret")]


class Panic(BaseException):
    """What a panic in a library written in Rust looks like."""


@pytest.mark.parametrize("error", [*FAILURES, Panic("/home/secret")], ids=["OSError", "AssertionError", "panic"])
async def test_a_load_that_fails_says_so_without_its_cause_and_the_next_init_tries_again(
    caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    async with scripted(loaded=False) as (server, model), server.client() as client:
        model.load_errors.append(error)
        failed = await init(client, "load")
        assert failed["code"] == "load_failed"
        assert "secret" not in failed["message"]
        assert "Error" not in failed["message"]
        logged = [record.exc_info[1] for record in caplog.records if record.levelno >= logging.ERROR and record.exc_info]
        assert error in logged
        model.open()
        assert (await init(client, "load"))["type"] == "ready"
        assert await started_with(client, "g") == "wsserver/echo"
        assert model.loads == 2


@pytest.mark.parametrize("error", FAILURES, ids=["OSError", "AssertionError"])
async def test_a_failed_load_leaves_the_connection_with_the_model_it_had(error: BaseException) -> None:
    async with scripted() as (server, model), server.client() as client:
        model.open()
        put(server.models, OTHER).open()
        broken = put(server.models, "test/broken")
        broken.load_errors.append(error)
        await init(client, "load", model=OTHER)
        assert (await init(client, "bad", model="test/broken"))["code"] == "load_failed"
        assert await started_with(client, "g") == OTHER


async def begin_load(client: Client, name: str, model: ScriptedModel) -> None:
    """Send an init whose load stands before its first gate."""
    model.load_gate.shut()
    await client.send(type="init", id="load", model=name)
    await model.in_load_stage(1)


async def test_a_generation_sent_right_behind_an_init_uses_the_new_model() -> None:
    async with scripted() as (server, _), server.client() as client:
        other = put(server.models, OTHER)
        await begin_load(client, OTHER, other)
        await client.send(type="generate", id="g", prompt="hello")
        assert (await client.until("queued"))["position"] == 1
        other.open()
        await client.until("done")
        assert client.of("g", "started")[0]["model"] == OTHER


async def test_a_generation_sent_right_behind_an_init_that_fails_ends_with_its_error() -> None:
    async with scripted() as (server, model), server.client() as client:
        other = put(server.models, OTHER)
        other.load_errors.append(OSError("/home/secret"))
        await begin_load(client, OTHER, other)
        await client.send(type="generate", id="g", prompt="hello")
        await client.settle()
        other.load_gate.open()
        done = await client.until("done")
        assert done["error"]["code"] == "load_failed"
        assert [frame["code"] for frame in client.of("load", "error")] == ["load_failed"]
        model.open()
        assert await started_with(client, "later") == "wsserver/echo"
        assert other.loads == 1


async def test_a_generation_sent_right_behind_an_init_that_is_cancelled_keeps_its_model() -> None:
    async with scripted() as (server, model), server.client() as client:
        other = put(server.models, OTHER)
        await begin_load(client, OTHER, other)
        await client.send(type="generate", id="g", prompt="hello")
        await client.send(type="cancel", id="load")
        assert (await client.until("error"))["code"] == "cancelled"
        other.open()
        model.open()
        assert (await client.until("done"))["finish_reason"] == "stop"
        assert client.of("g", "started")[0]["model"] == OTHER
        assert await started_with(client, "later") == "wsserver/echo"


async def test_of_two_inits_the_later_one_counts_even_if_the_earlier_is_ready_last() -> None:
    async with scripted() as (server, _), server.client() as client:
        slow, quick = put(server.models, "test/slow"), put(server.models, "test/quick")
        for model in (slow, quick):
            model.step_gate.open()
        await begin_load(client, "test/slow", slow)
        assert (await init(client, "quick", model="test/quick"))["type"] == "ready"
        slow.open()
        assert (await client.until("ready"))["model"]["id"] == "test/slow"
        assert await started_with(client, "g") == "test/quick"


async def test_an_init_that_fails_before_an_earlier_one_is_ready_leaves_the_earlier_ones_model() -> None:
    async with scripted() as (server, _), server.client() as client:
        slow = put(server.models, "test/slow")
        slow.step_gate.open()
        put(server.models, "test/broken").load_errors.append(OSError("broken"))
        await begin_load(client, "test/slow", slow)
        assert (await init(client, "broken", model="test/broken"))["code"] == "load_failed"
        slow.open()
        assert (await client.until("ready"))["model"]["id"] == "test/slow"
        assert await started_with(client, "g") == "test/slow"


async def test_an_init_that_fails_leaves_the_last_one_asked_for_not_the_last_one_ready() -> None:
    async with scripted() as (server, _), server.client() as client:
        slow, quick = put(server.models, "test/slow"), put(server.models, "test/quick")
        for model in (slow, quick):
            model.step_gate.open()
        put(server.models, "test/broken").load_errors.append(OSError("broken"))
        await begin_load(client, "test/slow", slow)
        await init(client, "quick", model="test/quick")
        slow.open()
        await client.until("ready")
        assert (await init(client, "broken", model="test/broken"))["code"] == "load_failed"
        assert await started_with(client, "g") == "test/quick"


async def test_the_same_model_at_another_precision_is_another_load() -> None:
    async with scripted() as (server, model), server.client() as client:
        assert (await init(client, "a", dtype="float32"))["type"] == "ready"
        assert (await init(client, "b", dtype="float32", device="auto", quantization="none"))["type"] == "ready"
        assert model.loads == 2
        assert len((await client.settle())["models"]) == 2
