"""The Python client over real sockets: what its user sees, and what becomes of the server's work."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve

from LLM.errors import Refused
from tests.conftest import ECHO, Running, eventually
from tests.scripted import STAGES, ScriptedModel, in_engine, put, scripted
from tests.torture.proxy import PROXIED, Proxy
from wsserver.auth import Keys, digest
from wsserver.client import Answer, Client, ConnectionLost, Parameters, Progress, ServerError, connect, dialing
from wsserver.client.messages import FRAMES
from wsserver.protocol import Generate, Loading, Prefill, Queued, ServerMessage, Started

TEXT = "0123456789abcdef" * 4  # 64 tokens of one character
MORE = "test/more"


class Stage:
    """A server with a scripted model, and a client that reaches it through a proxy."""

    def __init__(self, server: Running, model: ScriptedModel, proxy: Proxy) -> None:
        self.server = server
        self.model = model
        self.proxy = proxy
        self.url = f"ws://127.0.0.1:{proxy.port}/ws"
        self.states: list[str] = []
        self.may_dial = asyncio.Event()
        self.may_dial.set()

    async def pass_by(self, seconds: float) -> None:
        """Stand in for the wait between two dials."""
        await self.may_dial.wait()

    def connect(self, **options: Any) -> Client:
        return connect(self.url, on_state=self.states.append, **options)

    async def in_state(self, state: str) -> None:
        await eventually(lambda: self.states[-1:] == [state])

    async def lose(self) -> None:
        """Cut the connection, and wait until both sides know; `may_dial` lets the client come back."""
        self.may_dial.clear()
        for link in self.proxy.links.values():
            link.cut()
        await self.in_state("reconnecting")
        await eventually(lambda: all(job.listener is None for job in self.server.server.resumables))

    async def lose_and_regain(self) -> None:
        """Cut the connection, and wait for the next one."""
        await self.lose()
        self.may_dial.set()
        await self.in_state("connected")

    async def stopping(self) -> None:
        """Wait until the server has read a cancel."""
        await eventually(lambda: any(job.stopping for job in self.server.server.resumables))

    async def idle(self) -> None:
        """Wait until the server runs nothing, for whomever."""
        await eventually(lambda: not any(entry["active"] or entry["queued"] for entry in self.server.models.status()))
        await eventually(lambda: not self.model.held())


@contextlib.asynccontextmanager
async def staged(**settings: Any) -> AsyncIterator[Stage]:
    async with scripted(allow_host=PROXIED, **settings) as (server, model), Proxy(server.server.port) as proxy:
        stage = Stage(server, model, proxy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dialing, "_pass", stage.pass_by)
            yield stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged() as stage:
        yield stage


async def read(pieces: AsyncIterator[str], model: ScriptedModel, tokens: int) -> str:
    """Read so many tokens of one character, one after the other, and no further."""
    text = ""
    while len(text) < tokens:
        model.step_gate.let(1)
        text += await anext(pieces)
    return text


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


# Leaving and stopping.


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


# When the connection is lost.


@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 64])
async def test_cut_after_any_token_the_answer_goes_on(stage: Stage, tokens: int) -> None:
    async with stage.connect() as server, server.generate(prompt=TEXT) as answer:
        pieces = aiter(answer)
        text = await read(pieces, stage.model, tokens)
        await stage.model.in_step(tokens + 1)
        await server.status()  # so that its start was heard
        await stage.lose()
        stage.model.open()
        stage.may_dial.set()
        text += "".join([piece async for piece in pieces])
        assert (text, answer.done.finish_reason, answer.tokens) == (TEXT, "stop", 64)
        assert answer.done.usage.completion_tokens == 65
        assert stage.states == ["connected", "reconnecting", "connected"]
        assert len(stage.server.server.resumables) == 1


async def test_cut_again_and_again_several_answers_come_whole(stage: Stage) -> None:
    async with stage.connect() as server:
        answers = [server.generate(prompt=letter * 40) for letter in "abc"]
        texts = asyncio.gather(*(answer.text() for answer in answers))
        await in_engine(stage.server, 3)
        for cuts in range(1, 6):
            stage.model.step_gate.let(5)
            await stage.model.in_step(5 * cuts)
            await stage.lose_and_regain()
        stage.model.open()
        assert await texts == [letter * 40 for letter in "abc"]
        assert len(stage.proxy.links) == 6


async def test_one_that_waits_in_line_or_for_its_load_is_asked_for_anew() -> None:
    async with staged(loaded=False) as stage, stage.connect() as server:
        stage.model.load_gate.shut()
        load = asyncio.create_task(server.init(ECHO))
        text = asyncio.create_task(server.generate(prompt="hi", resumable=False).text())
        await stage.model.in_load_stage(1)
        report = asyncio.create_task(server.status())
        await stage.lose_and_regain()
        stage.model.open()
        assert (await load).model.id == ECHO
        assert await text == "hi"
        assert (await report).connection.session == (await server.status()).connection.session


async def test_one_that_is_not_resumable_ends_with_its_connection_and_others_go_on(stage: Stage) -> None:
    async with stage.connect() as server, server.generate(prompt=TEXT, resumable=False) as answer:
        pieces = aiter(answer)
        assert await read(pieces, stage.model, 3) == "012"
        await stage.lose_and_regain()
        with pytest.raises(ConnectionLost, match="not resumable"):
            await anext(pieces)
        with pytest.raises(ConnectionLost, match="not resumable"):
            _ = answer.done
        stage.model.open()
        assert await server.generate(prompt="hi").text() == "hi"


async def test_a_new_connection_uses_the_model_of_the_one_before(stage: Stage) -> None:
    more = put(stage.server.models, MORE)
    more.open()
    async with stage.connect() as server:
        await server.init(MORE)
        for _ in range(2):
            await stage.lose_and_regain()
            assert await server.generate(prompt="hi").text() == "hi"
        assert (len(more.steps), stage.model.steps) == (6, [])


async def test_where_its_model_is_not_to_be_had_any_more_nobody_gets_another_ones_answer(stage: Stage) -> None:
    put(stage.server.models, MORE).open()
    stage.model.open()
    async with stage.connect() as server:
        await server.init(MORE)
        del stage.server.models.listing[MORE]
        await stage.lose()
        stage.may_dial.set()
        await stage.in_state("closed")
        with pytest.raises(ServerError, match="model_not_found"):
            await server.generate(prompt="hi").text()
        assert stage.model.steps == []
        put(stage.server.models, MORE)


async def test_one_that_is_stopped_while_there_is_no_connection_is_stopped_by_the_next_one(stage: Stage) -> None:
    async with stage.connect() as server:
        stopped, left = server.generate(prompt=TEXT), server.generate(prompt=TEXT)
        pieces = aiter(stopped)
        await read(pieces, stage.model, 3)
        async with left:
            await in_engine(stage.server, 2)
            stage.model.step_gate.let(1)
            await eventually(lambda: len(stage.server.server.resumables) == 2)
            await server.status()  # so that its start was heard
            await stage.lose()
            stopped.cancel()
        stage.may_dial.set()
        await stage.stopping()
        stage.model.open()
        assert [piece async for piece in pieces] == [TEXT[3]], "it had come"
        assert stopped.done.finish_reason == "cancelled"
        await stage.idle()
        await server.status()
        assert left.done.finish_reason == "cancelled"


async def test_what_the_server_has_forgotten_is_an_error_where_text_was_read_and_begins_anew_where_none_was(
    stage: Stage,
) -> None:
    async with stage.connect() as server:
        pieces = aiter(server.generate(prompt=TEXT))
        await read(pieces, stage.model, 3)
        unread = asyncio.create_task(server.generate(prompt="new").text())
        await in_engine(stage.server, 2)
        stage.model.step_gate.let(1)
        await eventually(lambda: len(stage.server.server.resumables) == 2)
        await server.status()  # so that its start was heard
        await stage.lose()
        for job in list(stage.server.server.resumables):
            stage.server.server.resumables.forget(job)
        stage.may_dial.set()
        stage.model.open()
        assert await anext(pieces) == TEXT[3]  # it had come
        with pytest.raises(ServerError, match="resume_expired"):
            await anext(pieces)
        assert await unread == "new"


async def test_when_the_server_is_gone_for_too_long_everybody_is_told() -> None:
    async with staged() as stage, stage.connect(patience=0.0) as server:
        await server.init()
        pieces = aiter(server.generate(prompt=TEXT))
        await read(pieces, stage.model, 3)
        await stage.server.server.__aexit__(None, None, None)
        await stage.in_state("closed")
        for asked in (anext(pieces), server.status(), server.init(), server.generate(prompt="hi").text()):
            with pytest.raises(ConnectionLost, match="does not come back"):
                await asked
        stage.model.open()


async def test_nobody_listening_is_an_error_at_once() -> None:
    async with staged() as stage:
        url = stage.url
    with pytest.raises(OSError, match="Connect call failed"):
        await connect(url).__aenter__()
    with pytest.raises(ConnectionLost, match="async with connect"):
        await connect(url).generate(prompt="hi").text()


async def test_a_server_that_stops_lets_the_answer_end_and_is_waited_for() -> None:
    async with staged(drain_timeout=60.0) as stage, stage.connect(patience=0.0) as server:
        pieces = aiter(server.generate(prompt=TEXT))
        await read(pieces, stage.model, 3)
        drain = asyncio.create_task(stage.server.server.drain())
        await eventually(lambda: stage.server.server.state.draining)
        with pytest.raises(ServerError, match="shutting_down"):
            await server.generate(prompt="hi").text()
        stage.model.open()
        assert "".join([piece async for piece in pieces]) == TEXT[3:]
        await drain


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
