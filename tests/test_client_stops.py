"""The Python client when its user has had enough: leaving an answer, stopping it, stopping everything, closing."""

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.conftest import eventually
from tests.scripted import put
from tests.stage import MORE, TEXT, Stage, read
from wsserver.client import Answer, ConnectionLost, ServerError, connect


async def leave_by_break(answer: Answer) -> None:
    async for _ in answer:
        break


async def leave_by_return(answer: Answer) -> None:
    async for _ in answer:
        return


async def leave_by_exception(answer: Answer) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in answer:
            _ = 1 / 0


async def leave_by_cancellation(answer: Answer) -> None:
    reading = asyncio.create_task(answer.text())
    await eventually(lambda: answer.tokens > 0)
    reading.cancel()
    await asyncio.wait([reading])


async def leave_by_timeout(answer: Answer) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            async for _ in answer:
                timeout.reschedule(0)


async def leave_the_block(answer: Answer) -> None:
    async with answer:
        await eventually(lambda: answer.tokens > 0)


@pytest.mark.parametrize(
    "leave",
    [leave_by_break, leave_by_return, leave_by_exception, leave_by_cancellation, leave_by_timeout, leave_the_block],
)
async def test_who_leaves_cancels_at_once_and_waits_for_nothing(
    stage: Stage, leave: Callable[[Answer], Awaitable[None]]
) -> None:
    async with stage.connect() as server:
        answer = server.generate(prompt=TEXT)
        stage.model.step_gate.let(1)
        await leave(answer)
        # The step that is under way stands before its gate, so no end can have come.
        with pytest.raises(asyncio.InvalidStateError):
            _ = answer.done
        await stage.stopping()
        stage.model.step_gate.let(1)
        await stage.idle()
        await server.status()
        assert answer.done.finish_reason == "cancelled"
        assert answer.done.usage.completion_tokens <= 2


async def test_a_stopped_answer_goes_on_to_its_end_and_says_so(stage: Stage) -> None:
    async with stage.connect() as server:
        answer = server.generate(prompt=TEXT)
        text = ""
        stage.model.step_gate.let(3)
        async for piece in answer:
            text += piece
            if answer.tokens == 3:
                answer.cancel()
                answer.cancel()
                await stage.stopping()
                stage.model.open()
        assert (text, answer.done.finish_reason) == ("012", "cancelled")
        assert answer.done.timings.cancel_ms is not None


async def test_one_that_is_stopped_before_it_is_asked_for_never_runs(stage: Stage) -> None:
    async with stage.connect() as server:
        answer = server.generate(prompt=TEXT)
        answer.cancel()
        assert await answer.text() == ""
        assert (answer.done.finish_reason, stage.model.steps) == ("cancelled", [])


async def test_everything_is_stopped_at_once(stage: Stage) -> None:
    loading = put(stage.server.models, MORE)
    loading.load_gate.shut()
    async with stage.connect() as server:
        answers = [server.generate(prompt=letter * 30) for letter in "abc"]
        texts = asyncio.gather(*(answer.text() for answer in answers))
        load = asyncio.create_task(server.init(MORE))
        await loading.in_load_stage(1)
        await server.status()
        server.cancel()
        await server.status()
        stage.model.open()
        loading.load_gate.open()
        await texts
        assert {answer.done.finish_reason for answer in answers} == {"cancelled"}
        with pytest.raises(ServerError, match="cancelled: "):
            await load


async def test_who_closes_leaves_nothing_running_behind(stage: Stage) -> None:
    async with stage.connect() as server:
        answer = server.generate(prompt=TEXT)
        pieces = aiter(answer)
        await read(pieces, stage.model, 3)
    stage.model.step_gate.let(1)
    await stage.idle()
    await eventually(lambda: [job.ended for job in stage.server.server.resumables] == [True])
    assert stage.states == ["connected", "closed"]
    with pytest.raises(ConnectionLost, match="this client was closed"):
        await anext(pieces)
    with pytest.raises(ConnectionLost, match="this client was closed"):
        await server.status()


async def test_who_closes_right_after_coming_back_is_told_of_no_error(stage: Stage) -> None:
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    back = asyncio.Event()
    async with connect(stage.url, on_state=lambda state: back.set() if state == "connected" else back.clear()):
        await back.wait()
        (link,) = stage.proxy.links.values()
        link.cut()
        await eventually(lambda: not back.is_set())
        await back.wait()  # what it asked on coming back is not answered yet
    gc.collect()
    assert unheard == []
