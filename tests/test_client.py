"""The Python client over real sockets: what its user reads, is refused and is told meanwhile, and what other servers say."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve

from LLM.errors import Refused
from tests.conftest import ECHO, eventually
from tests.scripted import STAGES, in_engine, put
from tests.stage import MORE, TEXT, Stage, staged
from wsserver.auth import Keys, digest
from wsserver.client import ConnectionLost, Parameters, Progress, ServerError, connect
from wsserver.client.messages import FRAMES
from wsserver.protocol import Generate, Loading, Prefill, Queued, ServerMessage, Started

# Reading.


async def test_each_token_comes_when_it_is_made_and_the_end_is_there_after_the_last(stage: Stage) -> None:
    async with stage.connect() as server:
        answer = server.generate(prompt="hello", temperature=0)
        pieces = []
        stage.model.step_gate.let(1)
        async for piece in answer:
            pieces.append(piece)
            with pytest.raises(asyncio.InvalidStateError):
                _ = answer.done
            stage.model.step_gate.let(1 if len(pieces) < 5 else 2)
        assert pieces == list("hello")
        assert (answer.done.finish_reason, answer.done.usage.completion_tokens, answer.tokens) == ("stop", 6, 5)
        assert answer.done.timings.ttft_ms


async def test_what_was_not_read_in_time_comes_in_one_piece(stage: Stage) -> None:
    stage.model.open()
    async with stage.connect() as server, server.generate(prompt="hello") as answer:
        await eventually(lambda: answer.tokens == 5)
        assert [piece async for piece in answer] == ["hello"]


async def test_a_conversation_is_answered_with_the_parameters_given(stage: Stage) -> None:
    stage.model.open()
    async with stage.connect() as server:
        answer = server.generate(messages=[{"role": "user", "content": "Tell me"}], max_tokens=4)
        assert await answer.text() == "Tell"
        assert answer.done.finish_reason == "length"
        assert await answer.text() == "", "it was read already"


async def test_several_answers_come_at_once_on_one_connection(stage: Stage) -> None:
    async with stage.connect() as server:
        answers = [server.generate(prompt=letter * 30) for letter in "abc"]
        texts = asyncio.gather(*(answer.text() for answer in answers))
        await in_engine(stage.server, 3)
        stage.model.open()
        assert await texts == [letter * 30 for letter in "abc"]
        assert len(stage.proxy.links) == 1


async def test_an_answer_that_is_not_streamed_and_log_probabilities(stage: Stage) -> None:
    stage.model.open()
    async with stage.connect() as server:
        answer = server.generate(prompt="hi", stream=False, logprobs=1)
        assert await answer.text() == "hi"
        assert [entry.text for entry in answer.logprobs] == ["h", "i"]
        streamed = server.generate(prompt="hi", logprobs=0)
        assert await streamed.text() == "hi"
        assert [entry.text for entry in streamed.logprobs] == ["h", "i"]


async def test_an_answer_that_nobody_looks_at_is_not_asked_for(stage: Stage) -> None:
    async with stage.connect() as server:
        server.generate(prompt="hello")
        assert (await server.status()).connection.active == []


# Errors and progress.


async def test_what_the_server_refuses_is_raised_by_name(stage: Stage) -> None:
    async with stage.connect() as server:
        with pytest.raises(ServerError, match=r"bad_message: \$\.temperature") as raised:
            await server.generate(prompt="x", temperature=11).text()
        assert (raised.value.code, raised.value.retry_after) == ("bad_message", None)
        both = server.generate(prompt="x", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(ServerError, match="exactly one of messages and prompt"):
            await both.text()
        assert both.done.finish_reason == "error"
        with pytest.raises(ServerError, match="model_not_found: "):
            await server.init("nobody/knows")


async def test_one_that_is_turned_away_is_told_when_to_come_again() -> None:
    async with staged(max_active=1, max_queue=1) as stage, stage.connect() as server:
        texts = [asyncio.create_task(server.generate(prompt=TEXT).text()) for _ in range(3)]
        await in_engine(stage.server, 3)
        stage.model.step_gate.let(1)
        (refused,), waiting = await asyncio.wait(texts, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(ServerError, match="overloaded: ") as raised:
            await refused
        assert raised.value.retry_after
        assert raised.value.retry_after > 0
        stage.model.open()
        assert {await text for text in waiting} == {TEXT}


async def test_progress_is_told_before_the_text() -> None:
    told: list[Progress] = []
    async with staged(max_active=1) as stage, stage.connect() as server:
        first = asyncio.create_task(server.generate(prompt=TEXT).text())
        await stage.model.in_step(1)
        second = asyncio.create_task(server.generate(prompt="b" * 600, max_tokens=1, on_progress=told.append).text())
        await in_engine(stage.server, 2)
        stage.model.step_gate.let(1)
        await eventually(lambda: bool(told))
        stage.model.open()
        assert (await first, await second) == (TEXT, "b")
    assert [type(each) for each in told[:2]] == [Queued, Started]
    assert isinstance(told[0], Queued)
    assert told[0].position == 1
    assert {type(each) for each in told[2:]} <= {Prefill}


async def test_a_load_tells_how_it_goes_and_what_is_asked_next_gets_its_model(stage: Stage) -> None:
    told: list[Progress] = []
    more = put(stage.server.models, MORE)
    more.load_gate.shut()
    more.step_gate.open()
    async with stage.connect() as server:
        load = asyncio.create_task(server.init(MORE, on_progress=told.append))
        await more.in_load_stage(1)
        await eventually(lambda: bool(told))
        more.load_gate.open()
        ready = await load
        assert (ready.model.id, ready.protocol) == (MORE, 1)
        assert next(each.stage for each in told if isinstance(each, Loading)) == STAGES[0]
        assert await server.generate(prompt="hi").text() == "hi"
        assert (len(more.steps), stage.model.steps) == (3, [])


async def test_a_load_that_fails_leaves_the_model_there_was(stage: Stage) -> None:
    put(stage.server.models, MORE).load_errors.append(Refused("load_failed", "the folder is empty"))
    stage.model.open()
    async with stage.connect() as server:
        with pytest.raises(ServerError, match="load_failed: the folder is empty"):
            await server.init(MORE)
        assert await server.generate(prompt="hi").text() == "hi"
        assert stage.model.steps


async def test_a_load_that_nobody_waits_for_any_more_is_cancelled(stage: Stage) -> None:
    more = put(stage.server.models, MORE)
    more.load_gate.shut()
    async with stage.connect() as server:
        load = asyncio.create_task(server.init(MORE))
        await more.in_load_stage(1)
        load.cancel()
        await asyncio.wait([load])
        await server.status()
        more.load_gate.open()
        await eventually(more.load_gave_up.is_set)


async def test_status_is_answered_in_turn_though_one_who_asked_has_left(stage: Stage) -> None:
    async with stage.connect() as server:
        left = asyncio.create_task(server.status())
        kept = asyncio.create_task(server.status())
        await asyncio.sleep(0)
        left.cancel()
        assert (await kept).available.count(ECHO) == 1
        assert (await server.status()).server.draining is False


async def test_a_server_that_asks_for_a_key_is_shown_it_again_after_a_lost_connection() -> None:
    async with staged(keys=Keys({"anna": digest("sk-1")})) as stage:
        stage.model.open()
        async with stage.connect(key="sk-1") as server:
            await stage.lose_and_regain()
            assert await server.generate(prompt="hi").text() == "hi"
        with pytest.raises(ServerError, match="unauthenticated: "):
            await stage.connect(key="sk-2").__aenter__()
        async with stage.connect() as server:
            for asked in (server.generate(prompt="hi").text(), server.init(), server.status()):
                with pytest.raises(ServerError, match="unauthenticated: "):
                    await asked


# Other servers.


@contextlib.asynccontextmanager
async def saying(*frames: dict[str, Any] | str) -> AsyncIterator[str]:
    """Serve whoever asks for something with these frames."""

    async def say(client: ServerConnection) -> None:
        await client.recv()
        for frame in frames:
            await client.send(frame if isinstance(frame, str) else orjson.dumps(frame), text=True)
        await client.wait_closed()

    async with serve(say, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws"


USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}


async def test_what_a_later_server_says_beside_the_rest_is_ignored() -> None:
    frames = (
        {"type": "weather", "id": "g1", "sun": True},
        {"type": "started", "id": "g1", "model": "m", "prompt_tokens": 1, "cached_tokens": 0, "new": 1},
        {"type": "token", "id": "someone else", "seq": 0, "n": 1, "text": "no"},
        {"type": "token", "id": "g1", "seq": 0, "n": 1, "text": "yes"},
        {"type": "done", "id": "g1", "finish_reason": "tired", "usage": USAGE, "timings": {"total_ms": 1, "idle_ms": 1}},
    )
    async with saying(*frames) as url, connect(url) as server:
        answer = server.generate(prompt="hi")
        assert (await answer.text(), answer.done.finish_reason) == ("yes", "tired")


@pytest.mark.parametrize("frame", ["hello", "[]", "{}", '{"type": "token", "id": "g1"}'])
async def test_what_is_not_this_protocol_ends_everything(frame: str) -> None:
    async with saying(frame) as url, connect(url) as server:
        with pytest.raises(ConnectionLost, match="does not speak this protocol"):
            await server.generate(prompt="hi").text()
        assert server.state == "closed"


async def test_an_error_that_names_nothing_answers_a_status() -> None:
    error = {"type": "error", "code": "rate_limited", "message": "slowly", "retry_after_ms": 500}
    async with saying(error) as url, connect(url) as server:
        with pytest.raises(ServerError, match="rate_limited: slowly") as raised:
            await server.status()
        assert raised.value.retry_after == 0.5


# What it is made of.


def test_it_knows_every_frame_and_every_parameter() -> None:
    assert FRAMES.keys() == {kind.__struct_config__.tag for kind in ServerMessage.__args__}
    fields = {field.name for field in msgspec.structs.fields(Generate)}
    assert set(Parameters.__annotations__) == fields - {"id", "messages", "prompt", "resumable"}


def test_nothing_heavy_is_imported() -> None:
    command = [sys.executable, "-c", "import sys, wsserver.client; print(*{name.partition('.')[0] for name in sys.modules})"]
    imported = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert imported >= {"websockets", "orjson", "msgspec"}
    assert imported.isdisjoint({"torch", "transformers", "numpy", "LLM", "handlers", "uvloop"})
