from tests.conftest import Client, Running, eventually
from tests.scripted import in_engine, put, scripted
from wsserver import __version__


async def test_a_fresh_servers_status_has_every_part(client: Client, echo: Running) -> None:
    status = await client.settle()
    server = status["server"]
    assert (server["version"], server["draining"]) == (__version__, False)
    assert server["uptime_s"] >= 0
    assert status["models"] == []
    assert "wsserver/echo" in status["available"]
    assert status["available"] == sorted(echo.models.listing)
    assert status["connection"]["active"] == []


async def test_a_loaded_models_entry_has_every_field() -> None:
    async with scripted(max_active=3) as (server, _), server.client() as client:
        [entry] = (await client.settle())["models"]
        assert entry == {
            "id": "wsserver/echo",
            "state": "ready",
            "context_length": 65536,
            "dtype": "none",
            "quantization": "none",
            "device": "cpu",
            "memory_bytes": 4711,
            "active": 0,
            "queued": 0,
            "capacity": 3,
            "tokens_per_s": 0.0,
            "steps": 0,
        }


async def test_an_entry_tells_of_a_kv_cache_and_of_notes_where_there_are_any() -> None:
    async with scripted() as (server, model), server.client() as client:
        model.block_count, model.kv_bytes, model.notes = 10, 1 << 20, ["runs one sequence after the other"]
        [entry] = (await client.settle())["models"]
        assert entry["kv_cache"] == {"tokens": 160, "bytes": 1 << 20}
        assert entry["notes"] == ["runs one sequence after the other"]


async def test_status_tells_that_memory_ran_out_and_with_what_the_model_goes_on() -> None:
    async with scripted(max_active=3) as (server, model), server.client() as client:
        model.notes, model.step_errors = ["a note of the load"], {1: MemoryError(), 2: MemoryError()}
        model.open()
        assert (await client.generate(id="g", prompt="hello"))["joined"] == "hello"
        [entry] = (await client.settle())["models"]
        less = "ran out of memory: at most 64 prompt tokens and 3 sequences in a step"
        assert (entry["state"], entry["notes"]) == ("ready", ["a note of the load", less])


async def test_status_counts_what_runs_and_what_waits() -> None:
    async with scripted(max_active=2) as (server, model), server.client() as client:
        for number in range(1, 6):
            await client.send(type="generate", id=f"g{number}", prompt="hello")
            await in_engine(server, number)
        model.step_gate.let(4)
        await model.in_step(5)
        [entry] = (await client.settle())["models"]
        assert (entry["active"], entry["queued"]) == (2, 3)
        assert entry["tokens_per_s"] > 0
        model.open()
        for _ in range(5):
            await client.until("done")
        [entry] = (await client.settle())["models"]
        assert (entry["active"], entry["queued"]) == (0, 0)


async def test_status_is_answered_during_a_load_with_its_stage() -> None:
    async with scripted(loaded=False) as (server, model), server.client() as client:
        model.load_gate.shut()
        await client.send(type="init", id="load")
        await client.send(type="generate", id="g", prompt="hello")
        for stage, name in enumerate(("config", "weights", "warmup"), 1):
            await model.in_load_stage(stage)
            loading = client.of("load", "loading")[-1] if client.of("load", "loading") else {}
            while loading.get("stage") != name:
                loading = await client.until("loading")
            status = await client.settle()
            [entry] = status["models"]
            assert (entry["state"], entry["stage"]) == ("loading", name)
            assert entry["progress"] == (stage - 1) / 3
            assert (entry["active"], entry["queued"], entry["memory_bytes"]) == (0, 1, 0)
            assert status["connection"]["active"] == ["load", "g"]
            model.load_gate.let()
        model.open()
        await client.until("done")


async def test_status_is_answered_while_a_step_runs_and_lists_open_ids_oldest_first() -> None:
    async with scripted(max_active=1) as (server, model), server.client() as client:
        for id in ("running", "queued"):
            await client.send(type="generate", id=id, prompt="hello")
        await model.in_step(1)
        assert (await client.settle())["connection"]["active"] == ["running", "queued"]
        model.open()


async def test_an_id_that_is_being_cancelled_is_active_until_its_done() -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="hello")
        await model.in_step(1)
        await client.send(type="cancel", id="g")
        assert (await client.settle())["connection"]["active"] == ["g"]
        model.open()
        await client.until("done")
        assert (await client.settle())["connection"]["active"] == []


async def test_a_status_shows_nothing_of_other_connections() -> None:
    async with scripted() as (server, model), server.client() as client, server.client() as other:
        await client.send(type="generate", id="secret-id", prompt="secret-prompt")
        await model.in_step(1)
        session = (await client.settle())["connection"]["session"]
        status = await other.settle()
        assert status["connection"]["active"] == []
        assert status["models"][0]["active"] == 1
        assert "secret" not in str(status)
        assert session not in str(status)
        model.open()


async def test_every_status_is_answered_in_its_order(client: Client) -> None:
    for _ in range(20):
        await client.send(type="status")
        await client.send(type="generate", prompt="x")
    for _ in range(20):
        await client.until("status")
    while len(client.checker.dones) < 20:
        await client.until("done")


async def test_a_load_that_was_given_up_leaves_no_entry() -> None:
    async with scripted() as (server, _), server.client() as client:
        loading = put(server.models, "test/other")
        loading.load_gate.shut()
        await client.send(type="init", id="load", model="test/other")
        await loading.in_load_stage(1)
        await client.send(type="cancel", id="load")
        assert (await client.until("error"))["code"] == "cancelled"
        loading.load_gate.open()
        await eventually(lambda: all(entry["state"] != "loading" for entry in server.models.status()))
        assert [entry["id"] for entry in (await client.settle())["models"]] == ["wsserver/echo"]


async def test_a_load_that_failed_leaves_no_entry() -> None:
    async with scripted() as (server, _), server.client() as client:
        put(server.models, "test/broken").load_errors.append(ValueError("broken"))
        await client.send(type="init", id="load", model="test/broken")
        assert (await client.until("error"))["code"] == "load_failed"
        assert [entry["id"] for entry in (await client.settle())["models"]] == ["wsserver/echo"]
