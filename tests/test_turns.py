"""Several models on one CPU: their steps take turns, and a cancel counts before the step that it waits for."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from LLM._base_model_handler import GenerationOptions, LoadedModel, LoadOptions, Progress
from LLM.engine.turns import Turns
from LLM.engine.worker import EngineSettings
from LLM.model import Model, Waiter
from LLM.model_service import ModelService
from tests.conftest import ECHO, eventually
from tests.scripted import STAGES, ScriptedModel, put


class Counted(Turns):
    """With a count of those who have come and not gone."""

    @property
    def waiting(self) -> int:
        return len(self._line) - 1


class Computing(ScriptedModel):
    """A scripted model that says that it uses the CPU."""

    def load(self, folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
        return replace(super().load(folder, options, progress), takes_turns=True)


@contextlib.asynccontextmanager
async def two(second: ScriptedModel, patience: float = 60.0) -> AsyncIterator[tuple[Counted, ScriptedModel, Model, Model]]:
    """Give two loaded models, the first of which stands in a step of its own; its script comes before them."""
    service = ModelService(ECHO, LoadOptions(), EngineSettings(2))
    turns = service._turns = Counted(patience)
    first = put(service, "a/a", Computing())
    put(service, "b/b", second)
    try:
        models = [await service.get(service.resolve(name), Waiter()) for name in ("a/a", "b/b")]
        running = asyncio.create_task(generate(models[0], "long"))
        await first.in_step(1)
        yield turns, first, models[0], models[1]
        first.open()
        second.open()
        await running
    finally:
        first.open()
        second.open()
        await service.close()


async def generate(model: Model, prompt: str) -> str:
    request = await model.request(prompt, prompt, GenerationOptions())
    async with model.engine.open(request) as stream:
        parts = [part async for part in stream]
    return str(parts[-1].reason)  # type: ignore[union-attr]


async def test_models_on_one_cpu_take_turns() -> None:
    second = Computing()
    async with two(second) as (turns, first, _, model):
        second.open()
        other = asyncio.create_task(generate(model, "hi"))
        await eventually(lambda: turns.waiting == 1)
        assert second.steps == []
        first.step_gate.let()
        # Whoever waited is next, though the first has more to do.
        await second.in_step(1)
        first.open()
        assert await other == "stop"


async def test_a_cancel_counts_that_comes_while_another_model_has_its_turn() -> None:
    second = Computing()
    async with two(second) as (turns, first, _, model):
        second.open()
        other = asyncio.create_task(generate(model, "hi"))
        await eventually(lambda: turns.waiting == 1)
        model.engine.cancel("hi")
        first.open()
        assert await other == "cancelled"
        assert second.steps == []


async def test_an_engine_that_waits_for_its_turn_can_be_closed() -> None:
    async with two(Computing()) as (turns, first, _, model):
        other = asyncio.create_task(generate(model, "hi"))
        await eventually(lambda: turns.waiting == 1)
        closing = asyncio.create_task(model.engine.close())
        await asyncio.sleep(0)
        first.open()
        await closing
        assert await other == "shutdown"


async def test_a_model_that_needs_no_cpu_waits_for_nobody() -> None:
    second = ScriptedModel()
    async with two(second) as (turns, _, _, model):
        second.open()
        assert await asyncio.wait_for(generate(model, "hi"), 30) == "stop"
        assert turns.waiting == 0, "the first has its turn, and nobody waits"


async def test_a_load_lets_a_running_step_end_before_each_of_its_stages() -> None:
    async with two(ScriptedModel()) as (turns, first, _, _):
        third, service = ScriptedModel(), ModelService(ECHO, LoadOptions(), EngineSettings(2))
        service._turns = turns
        put(service, "c/c", third)
        loading = asyncio.create_task(service.get(service.resolve("c/c"), Waiter()))
        for stage in range(len(STAGES)):
            await eventually(lambda entered=stage: (turns.waiting, third.load_stages) == (1, entered))  # type: ignore[misc]
            first.step_gate.let()
        assert (await loading).status()["state"] == "ready"
        await service.close()


@pytest.mark.parametrize("entered", [1, 3])
async def test_a_turn_ends_when_a_step_raises(entered: int) -> None:
    async with two(Computing()) as (_, first, model, _):
        first.step_errors[1] = RuntimeError("the model's fault")
        first.open()
        for _ in range(entered):
            assert await asyncio.wait_for(generate(model, "again"), 30) == "stop"


async def test_a_step_that_hangs_is_waited_for_once() -> None:
    second = Computing()
    async with two(second, patience=0.05) as (turns, first, hangs, model):
        second.open()
        assert await asyncio.wait_for(generate(model, "as if nothing were"), 30) == "stop"
        await eventually(lambda: turns.waiting == -1)
        assert len(first.steps) == 1
        # It takes turns again when it comes back.
        first.open()
        assert await asyncio.wait_for(generate(hangs, "back"), 30) == "stop"
        await eventually(lambda: turns.waiting == -1)


def test_turns_go_to_whoever_came_first() -> None:
    turns, order, came = Counted(), list[int](), []
    with turns.take():
        for number in range(5):

            def work(number: int = number) -> None:
                with turns.take():
                    order.append(number)

            came.append(threading.Thread(target=work))
            came[-1].start()
            while turns.waiting <= number:
                pass
    for thread in came:
        thread.join()
    assert order == [0, 1, 2, 3, 4]
