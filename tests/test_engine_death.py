"""A model whose engine dies or hangs: loaded anew once by itself, then for whoever asks; other models feel nothing of it."""

import asyncio
import contextlib
import gc
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from LLM import model_service as service_module
from LLM._base_model_handler import GenerationOptions, LoadOptions
from LLM.engine import thread as thread_module
from LLM.engine.request import Finished
from LLM.engine.stream import GenerationStream
from LLM.engine.thread import GenerationEngine
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.model import Model, Waiter
from LLM.model_service import Keeping, ModelService
from LLM.restarts import QUIET
from tests.conftest import ECHO, eventually
from tests.scripted import Gate, ScriptedModel, SetClock, put
from tests.test_turns import Computing

BYTES = ScriptedModel.memory_bytes
OTHER = "b/b"


class Home:
    """A service on a clock of the test's, its default model, and what was asked of it."""

    def __init__(self, model: ScriptedModel, settings: EngineSettings, **keeping: Any) -> None:
        self.clock, self.model = SetClock(), model
        self.service = ModelService(ECHO, LoadOptions(), settings, keeping=Keeping(**keeping), clock=self.clock)
        put(self.service, ECHO, model)
        self.asked = 0

    async def load(self, name: str = ECHO) -> None:
        await self.service.get(self.service.resolve(name), Waiter())

    async def generate(self, prompt: str = "hello", name: str = ECHO, told: list[int] | None = None) -> Finished:
        self.asked += 1
        key, waiter = self.asked, Waiter(on_position=([] if told is None else told).append)
        async with self.service.use(self.service.resolve(name), waiter) as model:
            request = await model.request(key, prompt, GenerationOptions())
            async with model.engine.open(request) as stream:
                *_, end = [part async for part in stream]
        assert isinstance(end, Finished)
        return end

    async def generating(self, step: int, name: str = ECHO) -> "asyncio.Task[Finished]":
        """Begin to generate; when this returns, the model is in this step of its."""
        task = asyncio.create_task(self.generate(name=name))
        await self.model.in_step(step)
        return task

    async def die(self, just_before: Callable[[], object] = lambda: None) -> None:
        """Let the engine die in its next step."""
        step = len(self.model.steps) + 1
        self.model.step_gate.shut()
        self.model.step_errors[step] = SystemExit("out")
        task = await self.generating(step)
        just_before()
        self.model.step_gate.open()
        assert (await task).error == thread_module.STOPPED

    async def hang(self) -> None:
        """Let the engine hang in its next step, until the gate of steps is opened."""
        self.model.step_gate.shut()
        task = await self.generating(len(self.model.steps) + 1)
        self.clock.go(121)
        assert (await task).error == thread_module.HUNG

    def unpin(self) -> None:
        """Let the default model leave like any other one."""
        for model in self.service._models.values():
            model.tenants.pinned = False

    def forget_plans(self) -> None:
        """Let the next plan stand before its gate."""
        self.service._plans._made.clear()
        self.model.plan_gate.shut()

    async def loaded(self, count: int) -> None:
        await eventually(lambda: self.model.loads == count and self.entry()["state"] == "ready")

    async def turns(self) -> None:
        """Let happen what needs no time."""
        for _ in range(20):
            await asyncio.to_thread(int)

    async def backing_off(self, seconds: int) -> None:
        """Wait until a load stands before its back-off."""
        await eventually(lambda: self.clock.ahead == [seconds])

    def entry(self, name: str = ECHO) -> dict[str, Any]:
        [entry] = [entry for entry in self.service.status() if entry["id"] == name]
        return entry


@contextlib.asynccontextmanager
async def home(model: ScriptedModel | None = None, loaded: bool = True, **keeping: Any) -> AsyncIterator[Home]:
    model = model or ScriptedModel()
    its = Home(model, EngineSettings(2), **keeping)
    try:
        if loaded:
            await its.load()
        yield its
    finally:
        model.open()
        await its.service.close()


@pytest.mark.parametrize("hang", [False, True], ids=["dies", "hangs"])
async def test_a_model_whose_engine_died_is_loaded_anew_by_itself_after_a_second(hang: bool):
    async with home() as its:
        assert (its.entry()["state"], its.service.problem) == ("ready", None)
        assert "restarts" not in its.entry()
        await (its.hang() if hang else its.die())
        assert (its.entry()["state"], its.service.problem) == ("restarting", "the default model is restarting")
        await its.backing_off(1)
        assert (its.model.loads, "stage" in its.entry(), its.entry()["state"]) == (1, False, "restarting")
        its.model.load_gate.shut()
        its.clock.go(1)
        its.model.load_gate.let()
        await its.model.in_load_stage(5)
        await eventually(lambda: its.entry().get("stage") == "weights")
        assert (its.entry()["state"], its.service.problem) == ("restarting", "the default model is restarting")
        its.model.open()
        await its.loaded(2)
        assert (its.entry()["restarts"], its.entry()["steps"], its.service.problem) == (1, 0, None)
        assert (await its.generate()).reason == "stop"
        assert its.entry()["steps"] == 6


async def test_who_comes_while_a_model_is_loaded_anew_waits_in_line():
    async with home() as its:
        await its.die()
        told: list[list[int]] = [[], []]
        tasks = [asyncio.create_task(its.generate(told=positions)) for positions in told]
        await eventually(lambda: told == [[1], [2]])
        await its.backing_off(1)
        assert its.entry()["queued"] == 2
        its.clock.go(1)
        assert [end.reason for end in await asyncio.gather(*tasks)] == ["stop", "stop"]
        assert its.model.loads == 2


async def test_after_a_second_death_it_waits_for_the_next_who_asks_and_each_time_longer():
    async with home() as its:
        await its.die()
        await its.backing_off(1)
        its.clock.go(1)
        await its.loaded(2)
        for loads, seconds in enumerate([2, 4, 8, 16, 32, 60, 60], 3):
            await its.die()
            assert its.service.problem == "the default model failed; the next request loads it anew"
            await its.turns()
            assert (its.entry()["state"], its.clock.ahead, its.entry()["memory_bytes"]) == ("failed", [], 0)
            told: list[int] = []
            task = asyncio.create_task(its.generate(told=told))
            await its.backing_off(seconds)
            assert (its.entry()["state"], told) == ("restarting", [1])
            its.clock.go(seconds - 1)
            await its.turns()
            assert its.model.loads == loads - 1
            its.clock.go(1)
            assert (await task).reason == "stop"
            assert (its.model.loads, its.entry()["restarts"]) == (loads, loads - 1)


async def test_who_asks_long_after_a_second_death_need_not_wait():
    async with home() as its:
        await its.die()
        await its.backing_off(1)
        its.clock.go(1)
        await its.loaded(2)
        await its.die()
        its.clock.go(2)
        assert (await its.generate()).reason == "stop"
        assert its.entry()["restarts"] == 2


async def test_after_five_quiet_minutes_it_is_loaded_by_itself_again():
    async with home() as its:
        for loads in (2, 3, 4):
            await its.die()
            await its.backing_off(1)
            its.clock.go(1)
            await its.loaded(loads)
            assert its.entry()["restarts"] == loads - 1
            its.clock.go(QUIET)


async def test_a_back_off_is_kept_also_when_who_waited_for_it_has_left():
    async with home() as its:
        await its.die()
        await its.backing_off(1)
        its.clock.go(1)
        await its.loaded(2)
        await its.die()
        impatient = asyncio.create_task(its.generate())
        await its.backing_off(2)
        impatient.cancel()
        await asyncio.wait([impatient])
        its.clock.go(1)
        patient = asyncio.create_task(its.generate())
        await its.turns()
        assert (its.model.loads, its.clock.ahead) == (2, [1])
        its.clock.go(1)
        assert (await patient).reason == "stop"


async def test_a_load_anew_that_fails_is_told_and_forgotten_like_any_other():
    async with home() as its:
        its.model.load_errors.append(OSError("disk"))
        await its.die()
        await its.backing_off(1)
        waiting = asyncio.create_task(its.generate())
        await eventually(lambda: its.entry()["queued"] == 1)
        its.clock.go(1)
        with pytest.raises(Refused) as refused:
            await waiting
        assert refused.value.reason == "load_failed"
        assert (its.service.status(), its.service.problem) == ([], "the default model failed to load")
        assert (await its.generate()).reason == "stop"
        assert (its.service.problem, its.entry()["restarts"]) == (None, 1)


async def test_a_model_that_was_unloaded_meanwhile_is_not_loaded_anew():
    async with home() as its:
        await its.die(its.forget_plans)
        [model] = its.service._models.values()
        its.service._unload(model)
        its.model.plan_gate.open()
        await eventually(lambda: not its.service._restarting)
        assert (its.service.status(), its.model.loads, its.service.problem) == ([], 1, None)


async def test_a_model_that_nobody_uses_is_unloaded_after_its_restart_too():
    async with home(keep_alive=3600.0) as its:
        await its.die()
        await its.backing_off(1)
        its.clock.go(1)
        await its.loaded(2)
        [model] = its.service._models.values()
        await eventually(lambda: model.expiry is not None)


# What the others feel.


async def test_a_model_beside_one_that_hangs_goes_on_and_so_does_its_stream():
    first, second = Computing(), Computing()
    async with home(first) as its:
        its.service._turns._patience = 0.01
        put(its.service, OTHER, second)
        await its.load(OTHER)
        task = await its.generating(1)
        beside = asyncio.create_task(its.generate("a longer text", OTHER))
        second.step_gate.let(4)
        await second.in_step(5)  # the hung one's turn was passed on
        # Of both steps only the first one's is old: the second one's next began when the clock had been set.
        its.clock.set_forward(121)
        second.step_gate.let()
        await second.in_step(6)
        its.clock.happen()
        assert (await task).error == thread_module.HUNG
        second.open()
        assert (await beside).reason == "stop"
        assert (its.entry(OTHER)["state"], its.entry(OTHER)["steps"], second.loads) == ("ready", 14, 1)
        # It is loaded anew and serves beside its own hung thread.
        await its.backing_off(1)
        its.clock.go(1)
        await its.loaded(2)
        hung, first.step_gate = first.step_gate, Gate(math.inf)
        assert (await its.generate()).reason == "stop"
        assert len(its.service._leaving.stuck) == 1
        hung.open()
        await eventually(lambda: its.service._leaving.stuck == ())
        assert (await its.generate()).reason == "stop"


async def test_a_hung_thread_holds_its_memory_until_it_ends():
    async with home(memory=BYTES) as its:
        put(its.service, OTHER).open()
        await its.hang()
        await eventually(lambda: its.entry()["state"] == "failed")
        assert its.service.problem == "the default model failed; the next request loads it anew"
        assert its.entry()["memory_bytes"] == BYTES
        for name in (ECHO, OTHER):
            with pytest.raises(Refused, match=f"in use or always kept loaded: {ECHO};") as refused:
                await its.load(name)
            assert refused.value.reason == "overloaded"
        its.model.open()
        await eventually(lambda: its.entry()["memory_bytes"] == 0)
        its.clock.go(2)
        assert (await its.generate()).reason == "stop"
        assert its.model.loads == 2


async def test_a_hung_thread_that_ended_makes_room_for_another_model():
    async with home(memory=BYTES) as its:
        put(its.service, OTHER).open()
        await its.hang()
        await eventually(lambda: its.entry()["state"] == "failed")
        its.model.open()
        await eventually(lambda: its.entry()["memory_bytes"] == 0)
        await its.load(OTHER)
        assert [entry["state"] for entry in its.service.status()] == ["failed", "ready"]


async def test_nobody_waits_for_room_from_a_model_that_hangs_while_it_leaves():
    async with home(memory=BYTES) as its:
        its.unpin()
        put(its.service, OTHER).open()
        task = await its.generating(1)
        task.cancel()
        await asyncio.wait([task])
        loading = asyncio.create_task(its.load(OTHER))
        await eventually(lambda: [entry["id"] for entry in its.service.status()] == [OTHER])
        await its.turns()
        assert its.entry(OTHER)["state"] == "loading"
        its.clock.go(121)
        await loading
        assert len(its.service._leaving.stuck) == 1
        with pytest.raises(Refused, match="in use"):
            await its.load(ECHO)
        its.model.open()
        await eventually(lambda: not its.service._leaving)
        await its.load(ECHO)


# What is told of the default model.


async def test_what_keeps_a_server_from_its_default_model_is_told_from_the_start_to_the_end():
    async with home(loaded=False) as its:
        assert its.service.problem == "the default model is not loaded yet"
        its.model.load_gate.shut()
        task = asyncio.create_task(its.load())
        await its.model.in_load_stage(1)
        assert its.service.problem == "the default model is loading"
        its.model.load_gate.open()
        await task
        assert its.service.problem is None


async def test_a_default_model_that_was_unloaded_is_no_problem_and_neither_is_another_one():
    async with home(memory=BYTES) as its:
        its.unpin()
        other = put(its.service, OTHER)
        await its.load(OTHER)
        assert ([entry["id"] for entry in its.service.status()], its.service.problem) == ([OTHER], None)
        other.load_errors.append(OSError("disk"))
        its.service._unload(next(iter(its.service._models.values())))
        with pytest.raises(Refused):
            await its.load(OTHER)
        assert its.service.problem is None


async def test_a_default_model_that_cannot_be_loaded_is_a_problem_until_it_can():
    async with home(loaded=False) as its:
        its.model.load_errors.append(OSError("disk"))
        with pytest.raises(Refused):
            await its.load()
        assert its.service.problem == "the default model failed to load"
        await its.load()
        assert its.service.problem is None


async def test_the_default_model_is_known_by_what_its_words_came_to():
    async with home(loaded=False) as its:
        its.model.settles = {"auto": "bfloat16"}
        await its.load()
        await its.die()
        assert its.service.problem == "the default model is restarting"


# The end.


async def test_a_service_that_closes_leaves_a_stuck_thread_behind_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(service_module, "PATIENCE", 0.01)
    async with home() as its:
        assert not its.service.stuck
        task = await its.generating(1)
        await its.service.close()
        assert its.service.stuck
        assert "leaving its thread behind" in caplog.text
        assert (await task).reason == "shutdown"


@pytest.mark.parametrize("when", ["hangs", "backs off", "plans", "loads"])
async def test_a_service_can_be_closed_while_a_model_is_loaded_anew(when: str, caplog: pytest.LogCaptureFixture):
    async with home() as its:
        await (its.hang() if when == "hangs" else its.die(its.forget_plans if when == "plans" else lambda: None))
        if when != "plans":
            await its.backing_off(1)
        if when == "loads":
            its.model.load_gate.shut()
            its.clock.go(1)
            await its.model.in_load_stage(4)
        await its.service.close()
        assert its.service.stuck == (when != "backs off"), "a thread is left behind wherever one is at work"
        assert its.service.status() == []
        its.model.open()
        await eventually(lambda: not its.service._leaving)
        await its.turns()
        assert its.clock.ahead == []
        gc.collect()
        assert "never retrieved" not in caplog.text


@pytest.fixture
def no_log() -> Iterator[None]:
    """Log nothing: the tests' log would keep what was on the stack of the exceptions."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("hang", [False, True], ids=["dies", "hangs"])
@pytest.mark.usefixtures("no_log")
async def test_twenty_deaths_leave_nothing_behind(hang: bool):
    async with home() as its:
        its.model.open()
        await its.generate()
        before = left()
        for number in range(20):
            await (its.hang() if hang else its.die())
            its.model.step_gate.open()
            await its.backing_off(1)
            its.clock.go(1)
            await its.loaded(number + 2)
            its.clock.go(QUIET)
            its.model.steps.clear()
        await eventually(lambda: not its.service._leaving and not its.service._restarting)
        assert its.entry()["restarts"] == 20
        after = left()
        assert {kind: count for kind, count in after.items() if count > before[kind]} == {}
        kept = (its.service._plans, its.service._restarts, its.service._models)
        assert max(map(len, kept)) == 1


def left() -> dict[str, int]:
    """Count what a death might leave behind."""
    gc.collect()
    kinds = (GenerationEngine, Model, GenerationStream, asyncio.Task)
    engines = [thread for thread in threading.enumerate() if thread.name.startswith("engine")]
    return {kind.__name__: sum(issubclass(type(o), kind) for o in gc.get_objects()) for kind in kinds} | {
        "threads": len(engines)
    }
