"""Work that blocks: bounded, fair between owners, and left behind where it hangs."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest

from LLM.blocking import BlockingCalls, DefaultExecutor
from LLM.errors import Refused
from tests.conftest import eventually
from tests.scripted import SetClock


class Work:
    """Calls that stand until they are let go, and the order in which they began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def call(self, name: str) -> Callable[[], str]:
        self._gates[name] = threading.Event()
        return partial(self._do, name)

    def let(self, name: str) -> None:
        self._gates[name].set()

    def open(self) -> None:
        for gate in self._gates.values():
            gate.set()

    def _do(self, name: str) -> str:
        self.began.append(name)
        self._gates[name].wait()
        return name


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    work = Work()
    yield work
    work.open()


async def started(calls: BlockingCalls, work: Work, name: str, owner: str) -> "asyncio.Task[Any]":
    task = asyncio.create_task(calls.run(work.call(name), owner))
    await asyncio.sleep(0)
    return task


async def test_owners_take_turns_and_none_has_two_threads(work: Work):
    calls = BlockingCalls("reading", 2, 100, 60.0)
    tasks = [await started(calls, work, f"a{i}", "a") for i in range(3)]
    tasks += [await started(calls, work, f"b{i}", "b") for i in range(2)]
    tasks.append(await started(calls, work, "c0", "c"))
    await eventually(lambda: work.began == ["a0", "b0"])
    for name, then in (("b0", "b1"), ("b1", "c0"), ("a0", "a1"), ("a1", "a2")):
        work.let(name)
        await eventually(lambda then=then: work.began[-1] == then)
    work.open()
    assert await asyncio.gather(*tasks) == ["a0", "a1", "a2", "b0", "b1", "c0"]
    assert not calls.busy
    await calls.close()


async def test_a_cancelled_call_that_has_not_begun_never_begins(work: Work):
    calls = BlockingCalls("reading", 1, 100, 60.0)
    first = await started(calls, work, "first", "a")
    second = await started(calls, work, "second", "b")
    third = await started(calls, work, "third", "c")
    second.cancel()
    await asyncio.wait([second])
    work.open()
    assert await asyncio.gather(first, third) == ["first", "third"]
    assert work.began == ["first", "third"]
    await calls.close()


async def test_where_too_many_wait_the_owner_of_the_most_is_refused(work: Work):
    calls = BlockingCalls("reading", 1, 3, 60.0)
    tasks = [await started(calls, work, f"a{i}", "a") for i in range(4)]
    late = await started(calls, work, "b0", "b")
    with pytest.raises(Refused, match="try again") as refused:
        await tasks[3]
    assert refused.value.reason == "overloaded"
    work.open()
    assert await asyncio.gather(*tasks[:3], late) == ["a0", "a1", "a2", "b0"]
    await calls.close()


async def test_a_call_that_hangs_is_told_and_others_go_on_beside_it(work: Work):
    clock = SetClock()
    calls = BlockingCalls("reading a folder", 2, 3, 60.0, clock)
    hung = await started(calls, work, "hung", "a")
    clock.go(61)
    assert calls.problem == "reading a folder hangs"
    hung.cancel()
    await asyncio.wait([hung])
    assert (calls.busy, calls.problem) == (True, "reading a folder hangs"), "it hangs whether anybody waits or not"
    assert await calls.run(lambda: 5, "b") == 5
    work.open()
    await eventually(lambda: not calls.busy)
    assert calls.problem is None
    await calls.close()


async def test_a_close_leaves_behind_what_hangs(work: Work, caplog: pytest.LogCaptureFixture):
    calls = BlockingCalls("reading a folder", 2, 3, 60.0)
    hung = await started(calls, work, "hung", "a")
    await calls.close(0.01)
    assert calls.busy
    assert "reading a folder has not ended" in caplog.text
    work.open()
    await calls.close()
    assert not calls.busy
    assert await hung == "hung"


async def test_a_close_lets_what_waits_never_begin_and_leaves_nothing_behind(work: Work, caplog: pytest.LogCaptureFixture):
    calls = BlockingCalls("reading a folder", 1, 3, 60.0)
    running, waiting = [await started(calls, work, name, name) for name in ("runs", "waits")]
    closing = asyncio.create_task(calls.close())
    await asyncio.sleep(0)
    work.let("runs")
    await closing
    assert (await running, work.began, calls.busy, caplog.text) == ("runs", ["runs"], False, "")
    for late in (waiting, await started(calls, work, "late", "late")):
        with pytest.raises(Refused, match="is stopping"):
            await late


async def test_what_a_call_raises_is_raised():
    calls = BlockingCalls("reading", 1, 3, 60.0)
    with pytest.raises(ZeroDivisionError):
        await calls.run(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await calls.run(lambda: next(iter(())))
    with pytest.raises(SystemExit):
        await calls.run(partial(exec, "raise SystemExit"))
    await calls.close()


async def test_the_default_executor_tells_what_still_runs_on_it(work: Work):
    executor = DefaultExecutor()
    asyncio.get_running_loop().set_default_executor(executor)
    assert await asyncio.to_thread(int) == 0
    await eventually(lambda: not executor.busy)
    task = asyncio.create_task(asyncio.to_thread(work.call("x")))
    await eventually(lambda: work.began == ["x"])
    task.cancel()
    await asyncio.wait([task])
    assert executor.busy
    work.open()
    await eventually(lambda: not executor.busy)
