import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from LLM import model_srv_huggingfacetb_smollm2_135m_instruct as smollm2
from LLM._base_model_handler import BaseModelHandler, LoadOptions
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.listing import drop_in_name, list_models
from LLM.model import Waiter
from LLM.model_service import Keeping, ModelService
from tests.conftest import ECHO, eventually
from tests.scripted import ScriptedModel, put


@pytest.fixture
async def service() -> AsyncIterator[ModelService]:
    service = ModelService(ECHO, LoadOptions(), settings=EngineSettings(2))
    try:
        yield service
    finally:
        await service.close()


@pytest.fixture
def model(service: ModelService) -> Iterator[ScriptedModel]:
    model = put(service, ECHO)
    yield model
    model.open()


def ask(service: ModelService, waiter: Waiter | None = None) -> "asyncio.Task[object]":
    return asyncio.create_task(service.get(service.resolve(), waiter or Waiter()))


def add_folder(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("model_id", "module"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", "model_srv_mistralai_mistral_7b_instruct_v0_3"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "model_srv_huggingfacetb_smollm2_135m_instruct"),
        ("wsserver/echo", "model_srv_wsserver_echo"),
        ("a/B--1.0+", "model_srv_a_b_1_0"),
    ],
)
def test_a_drop_ins_file_name_is_its_model_id(model_id: str, module: str) -> None:
    assert drop_in_name(model_id) == module


def test_a_listing_holds_folders_with_a_config_and_drop_ins_that_need_none(tmp_path: Path) -> None:
    add_folder(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct")
    add_folder(tmp_path, "vendor/unknown-model")
    add_folder(tmp_path, "too/deep/for-a-model")
    (tmp_path / "vendor" / "no-config").mkdir()
    (tmp_path / "vendor" / "config.json").write_text("{}")
    listing = list_models(tmp_path)
    assert listing.keys() == {ECHO, "HuggingFaceTB/SmolLM2-135M-Instruct", "vendor/unknown-model"}
    assert listing["vendor/unknown-model"].handler is BaseModelHandler
    assert listing["vendor/unknown-model"].folder == tmp_path / "vendor" / "unknown-model"
    assert listing["HuggingFaceTB/SmolLM2-135M-Instruct"].handler is smollm2.ModelHandler


def test_a_folder_that_is_a_link_out_of_the_root_is_refused_with_what_to_do(tmp_path: Path) -> None:
    add_folder(tmp_path, "elsewhere/vendor/model")
    root = tmp_path / "root"
    add_folder(root, "vendor/real")
    (root / "vendor" / "out").symlink_to(tmp_path / "elsewhere" / "vendor" / "model")
    (root / "away").symlink_to(tmp_path / "elsewhere" / "vendor")
    (root / "vendor" / "within").symlink_to(root / "vendor" / "real")
    service = ModelService(ECHO, LoadOptions(), EngineSettings(), root)
    assert service.resolve("vendor/within").model == "vendor/within"
    for name in ("vendor/out", "away/model"):
        with pytest.raises(Refused, match="operator can move the model itself there") as refused:
            service.resolve(name)
        assert refused.value.reason == "load_failed"
        assert str(tmp_path) not in refused.value.message


def test_a_model_that_two_drop_ins_claim_is_refused_with_what_to_do(tmp_path: Path) -> None:
    class One(BaseModelHandler):
        also_listed_as = ("a/model", "b/model")

    class Two(BaseModelHandler):
        also_listed_as = ("b/model",)
        model_ids = ("no/folder",)

    class Three(BaseModelHandler):
        model_ids = ("no/folder",)

    add_folder(tmp_path, "a/model")
    listing = list_models(tmp_path, {"model_srv_one": One, "model_srv_two": Two, "model_srv_three": Three})
    assert listing["a/model"].problem is None
    assert listing["a/model"].handler is One
    service = ModelService(ECHO, LoadOptions(), EngineSettings())
    service.listing = listing
    for name in ("b/model", "no/folder"):
        with pytest.raises(Refused, match="all but one") as refused:
            service.resolve(name)
        assert refused.value.reason == "load_failed"


@pytest.mark.parametrize("name", ["../../etc", "vendor", "vendor/unknown-model/", "", "VENDOR/UNKNOWN-MODEL", "vendor/*"])
def test_a_name_is_only_ever_looked_up(tmp_path: Path, name: str) -> None:
    add_folder(tmp_path, "vendor/unknown-model")
    service = ModelService(ECHO, LoadOptions(), EngineSettings(), tmp_path)
    with pytest.raises(Refused, match="it has: vendor/unknown-model, wsserver/echo") as refused:
        service.resolve(name)
    assert refused.value.reason == "model_not_found"


def test_a_default_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such model"):
        ModelService("vendor/model", LoadOptions(), EngineSettings(), tmp_path)


def test_what_a_client_leaves_out_is_the_servers_choice() -> None:
    options = LoadOptions("bfloat16", "cuda:1", "int8", kv_memory=1 << 20, threads=3)
    service = ModelService(ECHO, options, EngineSettings())
    assert service.resolve().model == ECHO
    assert service.resolve().options == options
    assert service.resolve(dtype="float32", device="cpu").options == replace(options, dtype="float32", device="cpu")
    assert service.resolve(quantization="none").options == replace(options, quantization="none")


async def test_every_engine_runs_as_the_operator_set_it(model: ScriptedModel, service: ModelService) -> None:
    models = [await service.get(service.resolve(dtype=dtype), Waiter()) for dtype in ("float32", "bfloat16")]
    assert [loaded.engine.capacity for loaded in models] == [2, 2]
    assert [entry["capacity"] for entry in service.status()] == [2, 2]


async def test_all_who_ask_share_one_load(service: ModelService, model: ScriptedModel) -> None:
    models = await asyncio.gather(*(ask(service) for _ in range(5)))
    assert len(set(map(id, [*models, await ask(service)]))) == 1
    assert model.loads == 1


async def test_another_precision_is_another_model(service: ModelService, model: ScriptedModel) -> None:
    await service.get(service.resolve(dtype="float32"), Waiter())
    await service.get(service.resolve(dtype="bfloat16"), Waiter())
    assert model.loads == 2
    assert len(service.status()) == 2


async def test_progress_is_told_to_all_who_wait_and_positions_to_those_in_line(
    service: ModelService, model: ScriptedModel
) -> None:
    model.load_gate.shut()
    stages: list[str] = []
    positions: list[tuple[str, int]] = []
    tasks = [
        ask(service, Waiter(on_progress=lambda stage, _: stages.append(stage))),
        *(ask(service, Waiter(on_position=lambda at, name=name: positions.append((name, at)))) for name in "ab"),
    ]
    await eventually(lambda: len(positions) == 2)
    assert positions == [("a", 1), ("b", 2)]
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    assert positions == [("a", 1), ("b", 2), ("b", 1)]
    model.open()
    await asyncio.gather(tasks[0], tasks[2])
    assert stages == ["config", "weights", "warmup"]
    assert len(positions) == 3


async def test_a_load_that_lost_its_last_waiter_ends_at_its_next_report_and_is_forgotten(
    service: ModelService, model: ScriptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model.load_gate.shut()
    task = ask(service)
    await model.in_load_stage(1)
    task.cancel()
    await asyncio.wait([task])
    model.load_gate.let()
    await eventually(lambda: "gave up loading" in caplog.text)
    assert model.load_stages == 1
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    await eventually(lambda: service.status() == [])


async def test_who_comes_before_an_abandoned_load_has_noticed_takes_it_over(
    service: ModelService, model: ScriptedModel
) -> None:
    model.load_gate.shut()
    first = ask(service)
    await model.in_load_stage(1)
    first.cancel()
    await asyncio.wait([first])
    positions: list[int] = []
    second = ask(service, Waiter(on_position=positions.append))
    await eventually(lambda: positions == [1])
    model.open()
    await second
    assert model.loads == 1


async def test_who_comes_when_a_load_has_given_up_but_nobody_has_heard_of_it_gets_a_new_one(
    service: ModelService, model: ScriptedModel
) -> None:
    model.load_gate.shut()
    first = ask(service)
    await model.in_load_stage(1)
    first.cancel()
    await asyncio.wait([first])
    model.load_gate.let()
    assert model.load_gave_up.wait(timeout=10)  # without the loop, which so cannot hear of it
    model.open()
    await ask(service)
    assert model.loads == 2


async def test_a_failed_load_is_forgotten_and_tried_again(service: ModelService, model: ScriptedModel) -> None:
    model.load_errors += [OSError("disk"), Refused("unsupported", "not on this machine")]
    with pytest.raises(Refused) as refused:
        await ask(service)
    assert refused.value.reason == "load_failed"
    assert "disk" not in refused.value.message
    assert service.status() == []
    with pytest.raises(Refused, match="not on this machine"):
        await ask(service)
    await ask(service)
    assert model.loads == 3


async def test_all_who_wait_for_a_load_that_fails_are_told(service: ModelService, model: ScriptedModel) -> None:
    model.load_gate.shut()
    tasks = [ask(service) for _ in range(3)]
    await model.in_load_stage(1)
    model.load_errors.append(OSError("disk"))
    model.open()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Refused] * 3
    assert model.loads == 1


async def test_a_load_does_not_stop_the_loop(service: ModelService, model: ScriptedModel) -> None:
    model.load_gate.shut()
    task = ask(service)
    await model.in_load_stage(1)  # the loop runs while the load stands still
    assert service.status()[0]["state"] == "loading"
    model.open()
    await task
    assert service.status()[0]["state"] == "ready"


async def test_closing_ends_a_load_in_the_middle(service: ModelService, model: ScriptedModel) -> None:
    await asyncio.to_thread(int)  # plans are made in a thread that stays
    threads = set(threading.enumerate())
    model.load_gate.shut()
    task = ask(service)
    await model.in_load_stage(1)
    await service.close()
    await asyncio.wait([task])
    assert task.cancelled()
    model.load_gate.open()
    await eventually(lambda: set(threading.enumerate()) <= threads)
    assert model.load_stages == 1


# Several models: room, and how long one stays.

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

        async def slow_close() -> None:
            await leaving.wait()
            await close()

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
