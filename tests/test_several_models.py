"""Several models in one server: which leave to make room, and how long one stays that nobody uses."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from LLM._base_model_handler import LoadedModel, LoadOptions, Progress
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.model import Waiter
from LLM.model_service import Keeping, ModelService
from tests.conftest import ECHO, eventually
from tests.scripted import ScriptedModel, put, scripted
from tests.test_init import OTHER, init

BYTES = ScriptedModel.memory_bytes  # what each takes


@contextlib.asynccontextmanager
async def serving(*names: str, **keeping: Any) -> AsyncIterator[tuple[ModelService, list[ScriptedModel]]]:
    """Give a service that lists scripted models, and these."""
    service = ModelService(ECHO, LoadOptions(), EngineSettings(), keeping=Keeping(**keeping))
    models = [put(service, name) for name in names]
    try:
        yield service, models
    finally:
        for model in models:
            model.open()
        await service.close()


async def load(service: ModelService, name: str) -> None:
    await service.get(service.resolve(name), Waiter())


def there(service: ModelService) -> list[str]:
    return [str(entry["id"]) for entry in service.status()]


async def test_the_least_recently_used_of_those_nobody_uses_makes_room() -> None:
    async with serving("a/a", "b/b", "c/c", memory=2 * BYTES) as (service, _):
        await load(service, "a/a")
        await load(service, "b/b")
        await load(service, "a/a")
        await load(service, "c/c")
        assert there(service) == ["a/a", "c/c"]
        await load(service, "b/b")
        assert there(service) == ["c/c", "b/b"]


async def test_a_model_in_use_is_never_unloaded_and_what_is_in_the_way_is_told() -> None:
    async with serving("a/a", "b/b", "c/c", memory=2 * BYTES) as (service, _):
        async with service.use(service.resolve("a/a"), Waiter()), service.use(service.resolve("b/b"), Waiter()):
            with pytest.raises(Refused, match="while these are in use: a/a, b/b;") as refused:
                await load(service, "c/c")
            assert refused.value.reason == "overloaded"
            assert there(service) == ["a/a", "b/b"]
        # The second was left first.
        await load(service, "c/c")
        assert there(service) == ["a/a", "c/c"]


async def test_a_model_that_is_being_loaded_is_in_use() -> None:
    async with serving("a/a", "b/b", memory=BYTES) as (service, (first, _)):
        first.load_gate.shut()
        loading = asyncio.create_task(load(service, "a/a"))
        await first.in_load_stage(1)
        with pytest.raises(Refused, match="in use: a/a;"):
            await load(service, "b/b")
        first.open()
        await loading


async def test_a_model_that_would_not_fit_even_alone_is_refused_and_nobody_leaves_for_it() -> None:
    async with serving("a/a", "b/b", memory=BYTES) as (service, (_, large)):
        await load(service, "a/a")
        large.memory_bytes = BYTES + 1
        with pytest.raises(Refused, match="--memory") as refused:
            await load(service, "b/b")
        assert refused.value.reason == "load_failed"
        assert there(service) == ["a/a"]
        assert large.loads == 0


async def test_a_load_begins_when_those_that_leave_for_it_are_gone() -> None:
    async with serving("a/a", "b/b", memory=BYTES) as (service, (first, second)):
        await load(service, "a/a")
        leaving = asyncio.Event()
        engine = next(iter(service._models.values())).engine
        close = engine.close

        async def slow_close(patience: float | None) -> None:
            await leaving.wait()
            await close(patience)

        engine.close = slow_close  # type: ignore[method-assign]
        loading = asyncio.create_task(load(service, "b/b"))
        await eventually(lambda: there(service) == ["b/b"])
        for _ in range(10):
            await asyncio.sleep(0)
        assert second.loads == 0
        leaving.set()
        await loading
        assert second.loads == 1
        assert first.loads == 1


async def test_a_model_nobody_uses_is_unloaded_after_its_time_and_loaded_again_when_asked_for() -> None:
    async with serving("a/a", keep_alive=0.0) as (service, (model,)):
        async with service.use(service.resolve("a/a"), Waiter()):
            async with service.use(service.resolve("a/a"), Waiter()):
                pass
            for _ in range(10):
                await asyncio.sleep(0)
            assert there(service) == ["a/a"]
        await eventually(lambda: there(service) == [])
        await load(service, "a/a")
        assert model.loads == 2


async def test_who_comes_back_in_time_keeps_a_model_loaded() -> None:
    async with serving("a/a", keep_alive=3600.0) as (service, (model,)):
        await load(service, "a/a")
        loaded = next(iter(service._models.values()))
        first = loaded.expiry
        assert first is not None
        async with service.use(service.resolve("a/a"), Waiter()):
            assert first.cancelled()
        assert loaded.expiry is not None
        assert not loaded.expiry.cancelled()
        service._expire(loaded)
        assert loaded.expiry.cancelled()
        assert there(service) == []
        await load(service, "a/a")
        assert model.loads == 2


async def test_without_a_time_a_model_stays() -> None:
    async with serving("a/a") as (service, _):
        await load(service, "a/a")
        assert next(iter(service._models.values())).expiry is None


async def test_the_same_model_under_other_words_is_the_same() -> None:
    async with serving("a/a") as (service, (model,)):
        model.settles = {"auto": "bfloat16"}
        await asyncio.gather(*(service.get(service.resolve("a/a", dtype=dtype), Waiter()) for dtype in ("auto", "bfloat16")))
        assert model.loads == 1
        # What the words mean is asked again once the model has been unloaded.
        service._unload(next(iter(service._models.values())))
        model.settles = {"auto": "float32"}
        await load(service, "a/a")
        assert [entry["dtype"] for entry in service.status()] == ["none"]
        assert [spec.options.dtype for spec in service._models] == ["float32"]


@pytest.mark.parametrize(
    "error", [OSError("disk"), Refused("load_failed", "its weights are pickled")], ids=["raised", "refused"]
)
async def test_a_folder_that_cannot_be_planned_with_is_refused_and_tried_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving("a/a") as (service, (model,)):
        model.plan_errors.append(error)
        with pytest.raises(Refused) as refused:
            await load(service, "a/a")
        assert refused.value.reason == "load_failed"
        assert "disk" not in refused.value.message
        assert "a/a" in caplog.text
        assert there(service) == []
        await load(service, "a/a")


async def test_a_model_of_two_names_is_loaded_once() -> None:
    async with serving("a/a") as (service, (model,)):
        service.listing = {**service.listing, "another/name": service.listing["a/a"]}
        await load(service, "another/name")
        await load(service, "a/a")
        assert there(service) == ["a/a"]
        assert model.loads == 1


async def test_who_leaves_while_a_plan_is_made_leaves_no_word_of_its_failure_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving("a/a") as (service, (model,)):
        model.plan_gate.shut()
        model.plan_errors.append(Refused("load_failed", "the first time only"))
        asking = asyncio.create_task(load(service, "a/a"))
        await eventually(lambda: bool(service._plans))
        asking.cancel()
        await asyncio.wait([asking])
        model.plan_gate.open()
        await eventually(lambda: not service._plans)
        gc.collect()
        assert "never retrieved" not in caplog.text
        await load(service, "a/a")


async def test_an_engine_that_died_makes_room_too() -> None:
    async with serving("a/a", "b/b", memory=BYTES) as (service, _):
        async with service.use(service.resolve("a/a"), Waiter()) as model:
            model.engine.dead = True
        await load(service, "b/b")
        assert there(service) == ["b/b"]


# Over a socket.


async def test_an_init_is_told_what_is_in_its_way_and_has_room_once_that_is_done() -> None:
    async with scripted(memory=2 * ScriptedModel.memory_bytes) as (server, _), server.client() as client:
        model, other = put(server.models, "test/first"), put(server.models, OTHER)
        other.open()
        await init(client, "first", model="test/first")
        await client.send(type="generate", id="g", prompt="hello")
        await model.in_step(1)
        error = await init(client, "full", model=OTHER)
        assert (error["type"], error["code"]) == ("error", "overloaded")
        assert "in use or always kept loaded: test/first, wsserver/echo;" in error["message"]
        assert other.loads == 0
        model.open()
        assert (await client.done("g"))["finish_reason"] == "stop"
        assert (await init(client, "free", model=OTHER))["type"] == "ready"
        assert [entry["id"] for entry in (await client.settle())["models"]] == [ECHO, OTHER]
        # Who stays with the model that had to leave has it loaded again.
        await client.send(type="generate", id="again", model="ignored", prompt="hello")
        assert (await client.done("again"))["finish_reason"] == "stop"


async def test_a_model_that_nobody_uses_leaves_after_its_time_and_a_generation_loads_it_again() -> None:
    async with scripted(keep_alive=0.0) as (server, model), server.client() as client:
        model.open()
        await eventually(lambda: server.models.status() == [])
        assert (await client.generate(id="g", prompt="hello"))["finish_reason"] == "stop"
        assert model.loads == 2
        await eventually(lambda: server.models.status() == [])


async def test_what_is_held_for_a_model_is_given_back_when_it_is_gone() -> None:
    given_back: list[bool] = []
    engines: list[threading.Thread] = []

    class Held(ScriptedModel):
        def load(self, folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
            loaded = super().load(folder, options, progress)
            engines.append(threading.current_thread())
            return replace(loaded, on_unloaded=lambda: given_back.append(engines[0].is_alive()))

    service = ModelService(ECHO, LoadOptions(), EngineSettings(2), keeping=Keeping(keep_alive=0.0))
    put(service, "a/a", Held())
    async with service.use(service.resolve("a/a"), Waiter()):
        assert given_back == []
    await eventually(lambda: given_back != [])
    await service.close()
    assert given_back == [False], "once, and after the thread that held the model"
