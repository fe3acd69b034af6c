import pytest

from tests.conftest import Client, eventually
from tests.scripted import STAGES, WIDE, ScriptedModel, in_engine, put, scripted, slow_client


async def start(client: Client, model: ScriptedModel, id: str, prompt: str, steps: int) -> None:
    """Begin a generation on an idle engine and let some of its steps pass; the next one stands before its gate."""
    begun = len(model.steps)
    await client.send(type="generate", id=id, prompt=prompt)
    model.step_gate.let(steps)
    await model.in_step(begun + steps + 1)


async def cancel(client: Client, id: str | None = None) -> None:
    """Send a cancel, and wait until the server has read it."""
    await client.send(type="cancel", **({} if id is None else {"id": id}))
    await client.settle()


async def ends_cancelled(client: Client, id: str) -> dict[str, int]:
    """Give the usage of a done that has to say "cancelled", and see that nothing follows it."""
    done = await client.done(id)
    assert done["finish_reason"] == "cancelled"
    assert "error" not in done
    await client.settle()
    assert client.of(id)[-1] == done
    return done["usage"]


async def test_a_cancel_in_decode_is_answered_within_two_steps() -> None:
    async with scripted() as (server, model), server.client() as client:
        await start(client, model, "g", "hello world", steps=4)
        await cancel(client, "g")
        model.step_gate.let(2)
        usage = await ends_cancelled(client, "g")
        assert len(model.steps_of("g")) <= 6
        assert 4 <= usage["completion_tokens"] <= 6
        assert "hello"[:4].startswith(client.checker.texts["g"])
        assert model.frees("g") == 1


async def test_a_cancel_in_prefill_is_answered_within_one_chunk() -> None:
    async with scripted() as (server, model), server.client() as client:
        await start(client, model, "g", "x" * 2560, steps=2)
        await cancel(client, "g")
        model.step_gate.let(1)
        usage = await ends_cancelled(client, "g")
        assert model.steps_of("g") == [(0, 256), (256, 512), (512, 768)]
        assert usage == {"prompt_tokens": 2560, "completion_tokens": 0, "cached_tokens": 0}
        assert client.checker.texts["g"] == ""
        assert model.frees("g") == 1


async def test_a_cancel_in_line_is_answered_after_the_running_step_and_the_prefill_never_runs() -> None:
    async with scripted(max_active=1) as (server, model), server.client() as client, server.client() as other:
        await start(other, model, "running", "hello", steps=1)
        for number, id in enumerate(("cancelled", "next"), 2):
            await client.send(type="generate", id=id, prompt=id)
            await in_engine(server, number)
        await cancel(client, "cancelled")
        model.step_gate.let(1)
        assert (await ends_cancelled(client, "cancelled"))["completion_tokens"] == 0
        model.open()
        await client.done("next")
        await other.done("running")
        assert not model.steps_of("cancelled")
        assert not client.of("cancelled", "started")
        assert (client.checker.texts["next"], other.checker.texts["running"]) == ("next", "hello")


async def test_a_cancel_of_a_load_is_answered_at_once() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as client:
        model.load_gate.shut()
        await client.send(type="init", id="load")
        await model.in_load_stage(1)
        await client.send(type="cancel", id="load")
        assert (await client.until("error"))["code"] == "cancelled"
        model.load_gate.let(1)
        await client.send(type="init", id="load")
        model.open()
        await client.until("ready")


async def test_a_cancel_of_a_generation_that_waits_for_a_load_is_answered_at_once_with_no_tokens() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as client:
        model.load_gate.shut()
        await client.send(type="generate", id="g", prompt="hello")
        await client.until("queued")
        await model.in_load_stage(1)
        await cancel(client, "g")
        assert (await ends_cancelled(client, "g"))["completion_tokens"] == 0
        assert client.of("g", "done")[0]["timings"]["cancel_ms"] >= 0
        assert not model.steps


@pytest.mark.parametrize("stage", range(1, len(STAGES) + 1))
async def test_a_load_that_others_wait_for_goes_on_when_one_cancels(stage: int) -> None:
    async with scripted(loaded=False) as (server, model), server.client() as a, server.client() as b:
        model.load_gate.shut()
        model.step_gate.open()
        await a.send(type="init", id="load")
        await b.send(type="generate", id="g", prompt="hello")
        await b.settle()
        model.load_gate.let(stage - 1)
        await model.in_load_stage(stage)
        await cancel(a, "load")
        model.load_gate.open()
        await b.done("g")
        assert b.checker.texts["g"] == "hello"
        assert model.loads == 1


async def test_a_cancel_after_the_end_is_not_active_and_harmless() -> None:
    async with scripted() as (server, model), server.client() as client:
        model.open()
        await client.generate(id="g", prompt="hello")
        await cancel(client, "g")
        [error] = client.of("g", "error")
        assert error["code"] == "not_active"
        assert (await client.generate(id="g", prompt="world"))["joined"] == "world"


@pytest.mark.parametrize("message", [{"id": "nobody"}, {}])
async def test_a_cancel_of_nothing_is_not_active(client: Client, message: dict[str, str]) -> None:
    await client.send(type="cancel", **message)
    error = await client.until("error")
    assert (error["code"], error.get("id")) == ("not_active", message.get("id"))


async def test_a_cancel_reaches_no_other_connections_generation_of_that_id() -> None:
    async with scripted() as (server, model), server.client() as client, server.client() as other:
        await start(other, model, "g", "hello", steps=2)
        await client.send(type="cancel", id="g")
        assert (await client.until("error"))["code"] == "not_active"
        await client.send(type="cancel")
        assert (await client.until("error"))["code"] == "not_active"
        model.open()
        assert (await other.done("g"))["finish_reason"] == "stop"
        assert other.checker.texts["g"] == "hello"


async def test_a_second_cancel_adds_no_frame() -> None:
    async with scripted() as (server, model), server.client() as client:
        await start(client, model, "g", "hello", steps=2)
        for id in ("g", "g", None):
            await cancel(client, id)
        model.open()
        await ends_cancelled(client, "g")
        assert [frame["type"] for frame in client.frames].count("error") == 0
        assert len(client.of("g", "done")) == 1


async def test_a_cancel_without_id_stops_everything_of_this_connection_only() -> None:
    async with scripted(max_active=2) as (server, model), server.client() as client, server.client() as other:
        await start(other, model, "other", "untouched", steps=2)
        await client.send(type="generate", id="running", prompt="hello")
        await in_engine(server, 2)
        model.step_gate.let(1)
        await model.in_step_of("running")
        await client.send(type="generate", prompt="in line")
        await in_engine(server, 3)
        loading = put(server.models, "test/loading")
        loading.load_gate.shut()
        await client.send(type="init", id="load", model="test/loading")
        await client.send(type="generate", id="waits for the load", prompt="hello")
        await loading.in_load_stage(1)
        await cancel(client)
        model.open()
        for _ in range(3 - len(client.checker.dones)):
            await client.until("done")
        assert (await client.settle())["connection"]["active"] == []
        client.checker.quiet()
        assert {done["finish_reason"] for done in client.checker.dones} == {"cancelled"}
        assert len(client.checker.dones) == 3
        assert [frame["code"] for frame in client.of("load", "error")] == ["cancelled"]
        assert (await other.done("other"))["finish_reason"] == "stop"
        assert other.checker.texts["other"] == "untouched"


async def test_a_cancel_read_before_the_last_step_ends_wins_over_the_natural_end() -> None:
    async with scripted() as (server, model), server.client() as client:
        await start(client, model, "g", "hello", steps=5)  # the sixth samples the end
        await cancel(client, "g")
        model.step_gate.let(1)
        assert (await ends_cancelled(client, "g"))["completion_tokens"] == 6
        assert len(client.of("g", "done")) == 1


async def test_a_cancel_read_after_the_last_step_finds_nothing() -> None:
    async with scripted() as (server, model), server.client() as client:
        await start(client, model, "g", "hello", steps=5)
        model.step_gate.let(1)
        assert (await client.until("done"))["finish_reason"] == "stop"
        await client.send(type="cancel", id="g")
        assert (await client.until("error"))["code"] == "not_active"
        assert client.checker.texts["g"] == "hello"


async def test_a_cancelled_id_is_in_use_until_its_done_and_free_from_then_on() -> None:
    async with scripted() as (server, model), server.client() as client:
        await start(client, model, "g", "hello", steps=2)
        await client.send(type="cancel", id="g")
        await client.send(type="generate", id="g", prompt="too early")
        assert (await client.until("error"))["code"] == "duplicate_id"
        model.step_gate.let(1)
        await client.until("done")
        await client.send(type="generate", id="g", prompt="at once")
        model.open()
        assert (await client.until("done"))["finish_reason"] == "stop"
        assert client.checker.texts["g"] == "at once"


@pytest.mark.parametrize("length", [1, 300, 60_000])
async def test_a_cancel_right_behind_its_generate_wins(length: int) -> None:
    async with scripted() as (server, model), server.client() as client:
        for id in map(str, range(20)):
            await client.send(type="generate", id=id, prompt="x" * length)
            await cancel(client, id)
            model.open()
            await ends_cancelled(client, id)
            model.step_gate.shut()
        assert [frame["type"] for frame in client.frames].count("error") == 0


async def test_a_cancelled_answer_that_is_not_streamed_ends_cancelled_too() -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="hello", stream=False)
        model.step_gate.let(3)
        await model.in_step(4)
        await cancel(client, "g")
        model.open()
        await ends_cancelled(client, "g")
        assert "hello".startswith(client.of("g", "done")[0].get("text", ""))


async def test_tokens_still_waiting_for_a_slow_reader_are_dropped_by_a_cancel() -> None:
    async with scripted() as (server, model), slow_client(server) as client:
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="g", prompt=WIDE * 50, ignore_eos=True)
        for step in range(1, 201):
            model.step_gate.let()
            await model.in_step(step + 1)  # the loop takes turns with the engine, or all were one frame and sent
        await client.send(type="cancel", id="g")
        await eventually(lambda: model.step_gate.let() or model.frees("g") > 0)
        client.socket.transport.resume_reading()
        usage = await ends_cancelled(client, "g")
        assert usage["completion_tokens"] >= 200
        assert len(client.checker.texts["g"]) < 150 * len(WIDE)


async def test_a_done_that_answers_a_cancel_says_how_long_it_took_and_no_other_does() -> None:
    async with scripted() as (server, model), server.client() as client:
        await start(client, model, "g", "hello", steps=2)
        await cancel(client, "g")
        model.open()
        timings = (await client.done("g"))["timings"]
        assert 0 <= timings["cancel_ms"] <= timings["total_ms"]
        assert "cancel_ms" not in (await client.generate(id="h", prompt="hello"))["timings"]
