import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from LLM._base_model_handler import LoadOptions
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.model import Waiter
from LLM.model_service import ModelService
from tests.conftest import ECHO, add_folder, eventually
from tests.scripted import ScriptedModel, SetClock, put


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


class Place(Waiter):
    """One in line who keeps what he was told."""

    def __init__(self, owner: str = "") -> None:
        super().__init__(on_position=lambda position: self.told.append(position), owner=owner)
        self.told: list[int] = []


async def test_the_line_for_a_load_is_fair_between_owners(service: ModelService, model: ScriptedModel) -> None:
    model.load_gate.shut()
    heavy, light = [Place("heavy") for _ in range(3)], Place("light")
    tasks = [ask(service, place) for place in heavy]
    await eventually(lambda: [place.told for place in heavy] == [[1], [2], [3]])
    tasks.append(ask(service, light))
    await eventually(lambda: [place.told for place in [*heavy, light]] == [[1], [2, 3], [3, 4], [2]])
    model.open()
    await asyncio.gather(*tasks)


async def test_no_more_wait_for_a_load_than_may_and_who_has_most_in_line_loses_the_last(
    service: ModelService, model: ScriptedModel
) -> None:
    clock = service._clock = SetClock()
    service._settings = EngineSettings(2, max_queue=3)
    model.load_gate.shut()
    places = [Place("heavy") for _ in range(3)]
    tasks = [ask(service, place) for place in places]
    loading = ask(service, Waiter(on_progress=lambda stage, progress: None))
    await eventually(lambda: places[2].told == [3])
    clock.go(7.0)
    with pytest.raises(Refused, match=r"^3 requests may wait .* try again in") as refused:
        await ask(service, Place("heavy"))
    assert (refused.value.reason, refused.value.message[-6:]) == ("overloaded", f"{refused.value.retry_after: .1f} s"[-6:])
    assert refused.value.retry_after
    assert refused.value.retry_after >= 7, "as long again as it has taken until now"
    light = ask(service, Place("light"))
    with pytest.raises(Refused, match="requests may wait"):
        await tasks.pop(2)
    assert service.status()[0]["queued"] == 3
    model.open()
    await asyncio.gather(*tasks, light, loading)


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
