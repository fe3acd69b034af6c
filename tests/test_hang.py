"""A step that hangs: every stream has its end, and whatever the step yields in the end is dropped."""

import asyncio
import contextlib
import gc
import logging
import random
import weakref
from collections.abc import AsyncIterator
from functools import partial

import pytest

from LLM.engine import thread as thread_module
from LLM.engine.request import Finished, Part, Timings
from LLM.engine.turns import Turns
from LLM.engine.worker import EngineSettings
from tests.conftest import eventually
from tests.scripted import ScriptedModel, SetClock
from tests.test_thread import Engine, end, ends_of, load, parts_of, reading, request, text
from tests.test_turns import Computing, Counted

HUNG = ("error", "internal")


class Watched:
    """An engine on a clock of the test's, its model, and how often it was heard to have died."""

    def __init__(self, model: ScriptedModel, turns: Turns | None = None) -> None:
        self.clock, self.model, self.deaths = SetClock(), model, 0
        self.engine = Engine(EngineSettings(2), turns, self.clock)

    def heard(self) -> None:
        self.deaths += 1


@contextlib.asynccontextmanager
async def watched(model: ScriptedModel | None = None, turns: Turns | None = None) -> AsyncIterator[Watched]:
    model = model or ScriptedModel()
    its = Watched(model, turns)
    await its.engine.start(lambda: load(model), its.heard)
    try:
        yield its
    finally:
        model.open()
        await its.engine.close(patience=None)


async def test_a_step_that_hangs_ends_every_stream_once_and_the_engine_is_dead(caplog: pytest.LogCaptureFixture):
    async with watched() as its:
        tasks = await reading(its.engine, *(request(id) for id in "abcd"))
        its.model.step_gate.let(3)
        await its.model.in_step(4)
        its.clock.go(119)
        assert (its.engine.dead, its.deaths) == (False, 0)
        its.clock.go(2)
        assert (its.engine.dead, its.engine.stuck, its.engine.has_thread, its.deaths) == (True, True, True, 1)
        assert await ends_of(tasks) == [HUNG] * 4
        assert {end(task.result()).error for task in tasks} == {thread_module.HUNG}
        assert [end(task.result()).completion_tokens for task in tasks] == [len(text(task.result())) for task in tasks]
        assert (its.engine.active, its.engine.queued, its.clock.ahead) == (0, 0, [])
        assert "takes longer than 120 s" in caplog.text
        late = await parts_of(its.engine, request("late"))
        assert late == [Finished("error", len("hello"), Timings(0.0), error=thread_module.STOPPED)]


async def test_what_a_hung_step_yields_is_dropped_and_the_thread_ends(caplog: pytest.LogCaptureFixture):
    async with watched() as its:
        (task,) = await reading(its.engine, request("a"))
        await its.model.in_step(1)
        its.clock.go(121)
        parts = await task
        heard = list(parts)
        its.model.open()
        await eventually(lambda: not its.engine.has_thread)
        assert not its.engine.stuck
        await its.engine.close()
        assert parts == heard
        assert len(its.model.steps) == 1
        assert its.model.held() == set()
        assert its.deaths == 1
        assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == [
            "a step takes longer than 120 s; giving the engine up"
        ]


async def test_a_step_that_hung_and_then_raises_is_one_death():
    async with watched() as its:
        (task,) = await reading(its.engine, request("a"))
        await its.model.in_step(1)
        its.clock.go(121)
        its.model.step_errors[1] = SystemExit("out")
        its.model.open()
        assert await ends_of([task]) == [HUNG]
        await eventually(lambda: not its.engine.has_thread)
        await its.engine.close()
        assert its.deaths == 1


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_dead_engine_holds_nothing_of_its_model_once_the_thread_has_gone(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(thread_module.log, "disabled", True)  # the tests' own log keeps what is on the stack of an exception
    clock, model = SetClock(), ScriptedModel()
    engine, held = Engine(EngineSettings(2), clock=clock), weakref.ref(model)
    await engine.start(partial(load, model))
    (task,) = await reading(engine, request("a"))
    await model.in_step(1)
    if hangs:
        clock.go(121)
    else:
        model.step_errors[1] = SystemExit("out")
    model.open()
    del model
    await task
    await eventually(lambda: not engine.has_thread)
    await engine.close()
    gc.collect()
    assert held() is None


async def test_it_is_watched_as_long_as_streams_are_open():
    async with watched() as its:
        assert its.clock.ahead == []
        (task,) = await reading(its.engine, request("a"))
        await its.model.in_step(1)
        assert its.clock.ahead == [120]
        its.model.open()
        assert await ends_of([task]) == [("stop", None)]
        assert its.clock.ahead == []
        await eventually(lambda: its.engine._step_began() is None)
        its.clock.go(1000)
        assert await ends_of(await reading(its.engine, request("b"))) == [("stop", None)], "the last step was long ago"


async def test_a_step_that_hangs_for_nobody_is_noticed_by_the_next_who_comes():
    async with watched() as its:
        (task,) = await reading(its.engine, request("a"))
        await its.model.in_step(1)
        task.cancel()
        await asyncio.wait([task])
        its.clock.go(500)
        assert not its.engine.dead
        assert await ends_of(await reading(its.engine, request("b"))) == [HUNG]
        assert its.engine.dead


async def test_many_steps_may_take_long_together():
    async with watched() as its:
        (task,) = await reading(its.engine, request("a"))
        for step in range(1, 7):
            await its.model.in_step(step)
            its.clock.go(100)
            its.model.step_gate.let()
        assert await ends_of([task]) == [("stop", None)]


async def test_to_wait_for_a_turn_is_no_step():
    turns = Counted(patience=60.0)
    async with watched(Computing(), turns) as first, watched(Computing(), turns) as second:
        (running,) = await reading(first.engine, request("a"))
        await first.model.in_step(1)
        (waiting,) = await reading(second.engine, request("b"))
        await eventually(lambda: turns.waiting == 1)
        second.clock.go(1000)
        assert (second.engine.dead, second.engine.steps) == (False, 0)
        first.clock.go(1000)
        assert first.engine.dead
        assert await ends_of([running]) == [HUNG]
        # The one whose turn it is comes back; as if it did not, `test_turns.py` shows.
        first.model.open()
        second.model.open()
        assert await ends_of([waiting]) == [("stop", None)]


async def test_the_steps_are_counted_also_when_the_engine_has_ended():
    async with watched() as its:
        assert its.engine.steps == 0
        its.model.open()
        await ends_of(await reading(its.engine, request("a")))
        assert its.engine.steps == len(its.model.steps) == 6
        await its.engine.close()
        assert its.engine.steps == 6


@pytest.mark.parametrize("seed", range(20))
async def test_every_stream_ends_once_also_when_a_step_hangs_in_the_middle_of_anything(seed: int):
    draw = random.Random(seed)
    async with watched() as its:
        tasks: dict[str, asyncio.Task[list[Part]]] = {}
        for i in range(40):
            match draw.choice(["open", "open", "cancel", "abandon", "step", "step", "pass by", "hang", "return"]):
                case "open":
                    prompt = "x" * draw.choice([1, 20, 600])
                    tasks[str(i)] = (await reading(its.engine, request(str(i), prompt)))[0]
                case "cancel" if tasks:
                    its.engine.cancel(("session", draw.choice(list(tasks))))
                case "abandon" if tasks:
                    tasks[draw.choice(list(tasks))].cancel()
                case "step":
                    its.model.step_gate.let(draw.randint(1, 9))
                case "pass by":
                    its.clock.go(50)
                case "hang" if draw.random() < 0.3:
                    its.clock.go(121)
                case "return" if its.engine.dead:
                    its.model.open()
            await asyncio.sleep(0)
        died, hung = its.engine.dead, its.engine.stuck
        its.model.open()
        ended = await asyncio.wait_for(asyncio.gather(*tasks.values(), return_exceptions=True), 20)
        for parts in ended:
            if isinstance(parts, list):
                assert end(parts).reason in ("stop", "cancelled", "error")
                assert text(parts) == "x" * len(text(parts))
                assert end(parts).error in (None, thread_module.HUNG, thread_module.STOPPED)
            else:
                assert isinstance(parts, asyncio.CancelledError)
        assert (its.engine.active, its.engine.queued, its.deaths) == (0, 0, int(died))
        assert died or not hung
        await eventually(lambda: its.model.held() == set())


# Closing.


async def test_a_close_leaves_a_step_behind_that_does_not_end_in_time(caplog: pytest.LogCaptureFixture):
    async with watched() as its:
        tasks = await reading(its.engine, request("a"), request("b"))
        await its.model.in_step(1)
        await its.engine.close(patience=0.01)
        assert await ends_of(tasks) == [("shutdown", None)] * 2
        assert (its.engine.dead, its.engine.has_thread, its.deaths) == (True, True, 0)
        assert "leaving its thread behind" in caplog.text
        assert its.clock.ahead == []
        its.model.open()
        await eventually(lambda: not its.engine.has_thread)


async def test_a_closing_engine_is_watched_also_when_nobody_listens():
    async with watched() as its:
        (task,) = await reading(its.engine, request("a"))
        await its.model.in_step(1)
        task.cancel()
        await asyncio.wait([task])
        closing = asyncio.create_task(its.engine.close(patience=None))
        await asyncio.sleep(0)
        assert its.clock.ahead == [120]
        its.clock.go(121)
        assert (its.engine.stuck, its.deaths, closing.done()) == (True, 1, False)
        its.model.open()
        await closing
        assert not its.engine.stuck
