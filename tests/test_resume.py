"""Resume over real sockets: what a client may rely on when its connection is lost, and every race around that."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.conftest import Client, Running, eventually, running
from tests.scripted import WIDE, ScriptedModel, closing_code, in_engine, put, scripted, slow_client

TEXT = "0123456789abcdef" * 4  # 64 tokens of one character


@pytest.fixture
async def stage() -> AsyncIterator[tuple[Running, ScriptedModel]]:
    async with scripted() as stage:
        yield stage


async def cut(client: Client) -> None:
    client.socket.transport.abort()
    await client.socket.wait_closed()


async def begun(client: Client, model: ScriptedModel, tokens: int = 3, busy: Running | None = None, **fields: Any) -> None:
    """Begin a resumable generation and read so many of its tokens; a `busy` server has another one in a step before it."""
    message = {"id": "g", "prompt": TEXT, "resumable": True, **fields}
    await client.send(type="generate", **message)
    if busy:
        await in_engine(busy, 2)
        model.step_gate.let(1)
    if not client.of(message["id"], "started"):
        await client.until("started", id=message["id"])
    while client.asked(message["id"]).next_seq < tokens:
        model.step_gate.let(1)  # one after the other, so that each comes in a frame of its own
        await client.until("token", id=message["id"])


def token_of(client: Client) -> str:
    token: str = client.of("g", "started")[0]["resume_token"]
    return token


async def step_by_step(model: ScriptedModel, steps: int) -> None:
    """Let the model make so many steps, each once the last one's token is with the server: pieces stay small."""
    for number in range(len(model.steps), len(model.steps) + steps):
        await model.in_step(number)
        model.step_gate.let(1)


def no_listener(server: Running) -> bool:
    return all(job.listener is None for job in server.server.resumables)


async def unheard(server: Running) -> None:
    """Wait until the server has noticed that the connection is gone."""
    await eventually(lambda: no_listener(server))


async def nothing_left(server: Running, model: ScriptedModel) -> None:
    await eventually(lambda: len(server.server.resumables) == 0 and server.server.resumables.size == 0)
    await eventually(lambda: not any(entry["active"] or entry["queued"] for entry in server.models.status()))
    await eventually(lambda: not model.held())


@pytest.mark.parametrize("read", range(65))
async def test_cut_at_every_token_the_rest_comes_and_the_text_is_the_same(
    stage: tuple[Running, ScriptedModel], read: int
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model, read)
        await cut(client)
        await unheard(server)
        await other.resume(client, "g")
        assert (await other.until("resumed"))["seq"] == read
        model.open()
        done = await other.done("g")
        assert (done["finish_reason"], other.checker.texts["g"]) == ("stop", TEXT)
        assert done["usage"]["completion_tokens"] == 65
        other.checker.quiet()


async def test_what_was_made_while_nobody_listened_comes_as_one_frame_and_then_the_live_ones(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        await cut(client)
        await unheard(server)
        model.step_gate.let(10)
        await model.in_step(14)
        await other.resume(client, "g")
        assert (await other.until("token"))["text"] == TEXT[3:13]
        for place in (13, 14):
            model.step_gate.let(1)
            assert (await other.until("token"))["text"] == TEXT[place]


async def test_what_ended_while_nobody_listened_is_replayed_with_its_done_and_again_if_that_is_lost_too(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client:
        await begun(client, model)
        await cut(client)
        model.open()
        await model.freed_of("g")
        for _ in range(3):
            async with server.client() as other:
                await other.resume(client, "g", after_seq=3)
                assert (await other.done("g"))["finish_reason"] == "stop"
                assert other.checker.texts["g"] == TEXT
                assert (await other.settle())["connection"]["active"] == []


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_client_may_go_back_to_any_token_it_was_sent(stage: tuple[Running, ScriptedModel], after: int) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        await cut(client)
        await unheard(server)
        await other.send(type="resume", id="g", resume_token=token_of(client), after_seq=after)
        model.open()
        await other.done("g")
        assert "".join(frame["text"] for frame in other.of("g", "token")) == TEXT[after:]


@pytest.mark.parametrize("changes", [{"resume_token": "x" * 32}, {"id": "h"}], ids=["wrong token", "unknown id"])
async def test_a_wrong_token_and_an_unknown_id_are_told_the_same_and_harm_nobody(
    stage: tuple[Running, ScriptedModel], changes: dict[str, str]
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as thief:
        await begun(client, model)
        token = token_of(client)
        await thief.send(**{"type": "resume", "id": "g", "resume_token": token, "after_seq": 3, **changes})
        error = await thief.until("error")
        assert (error["code"], error["id"]) == ("resume_expired", changes.get("id", "g"))
        assert "nothing to resume under this id and token" in error["message"]
        model.open()
        assert (await client.done("g"))["finish_reason"] == "stop"
        assert client.checker.texts["g"] == TEXT


@pytest.mark.parametrize("after", [1, 4, 64], ids=["within a frame", "soon", "much later"])
async def test_a_place_where_no_frame_ended_is_refused_by_name_and_the_old_connection_keeps_it(
    stage: tuple[Running, ScriptedModel], after: int
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model, 0, prompt="é" + TEXT, max_tokens=20)
        model.step_gate.let(3)  # the first two are one character's two bytes
        await client.until("token")
        await other.resume(client, "g", after_seq=after)
        error = await other.until("error")
        assert (error["code"], error["message"][:11]) == ("bad_message", "$.after_seq")
        model.open()
        assert (await client.done("g"))["finish_reason"] == "length"


async def test_without_the_wish_a_lost_connection_ends_a_generation_and_there_is_no_token(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client:
        await begun(client, model, resumable=False)
        assert "resume_token" not in client.of("g", "started")[0]
        await cut(client)
        await eventually(lambda: model.step_gate.let() or model.frees("g") == 1)
        await nothing_left(server, model)


async def test_a_connection_that_is_lost_before_the_start_takes_the_generation_with_it() -> None:
    async with scripted(max_active=1) as (server, model), server.client() as busy:
        await begun(busy, model, id="busy")
        async with server.client() as client:
            await client.send(type="generate", id="g", prompt=TEXT, resumable=True)
            await in_engine(server, 2)
            model.step_gate.let(1)
            await client.until("queued")
        await in_engine(server, 1)
        model.open()
        await busy.done("busy")
        await eventually(lambda: not any(entry["active"] or entry["queued"] for entry in server.models.status()))
        assert not model.steps_of("g")


async def test_resumed_elsewhere_the_old_connection_is_told_and_hears_no_more_of_it(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        await other.resume(client, "g")
        await client.until("detached", id="g")
        await other.until("resumed")
        assert (await client.settle())["connection"]["active"] == []
        # The id is free on the old connection, and what happens to that one is nothing to the new one.
        await client.send(type="generate", id="g", prompt="again")
        await cut(client)
        model.open()
        assert (await other.done("g"))["finish_reason"] == "stop"
        assert other.checker.texts["g"] == TEXT


async def test_the_id_may_be_used_anew_where_it_was_lost_while_the_first_one_runs_elsewhere(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        await other.resume(client, "g")
        await client.until("detached")
        await begun(client, model, 0, busy=server, prompt="another one")
        model.open()
        await client.done("g")
        await other.done("g")
        assert (client.checker.texts["g"], other.checker.texts["g"]) == ("another one", TEXT)


async def test_a_cancel_on_the_connection_that_lost_it_finds_nothing(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        await other.resume(client, "g")
        await client.until("detached")
        await client.send(type="cancel", id="g")
        assert (await client.until("error"))["code"] == "not_active"
        model.open()
        assert (await other.done("g"))["finish_reason"] == "stop"


async def test_on_the_connection_that_has_it_a_resume_is_a_duplicate(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client:
        await begun(client, model)
        await client.resume(client, "g")
        assert (await client.until("error"))["code"] == "duplicate_id"
        model.open()
        assert (await client.done("g"))["finish_reason"] == "stop"
        assert client.checker.texts["g"] == TEXT
        # Once it has ended there, it may be resumed there as well.
        await client.resume(client, "g", after_seq=0)
        await client.until("done")


async def test_an_id_that_is_another_generations_on_the_new_connection_is_a_duplicate(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        await begun(other, model, 0, busy=server, prompt="something else")
        await other.resume(client, "g")
        assert (await other.until("error"))["code"] == "duplicate_id"
        model.open()
        await client.done("g")
        await other.done("g")
        assert (client.checker.texts["g"], other.checker.texts["g"]) == (TEXT, "something else")


# Cancel.


async def test_a_cancel_on_the_new_connection_ends_it(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        await cut(client)
        await other.resume(client, "g")
        await other.until("resumed")
        await other.send(type="cancel", id="g")
        await other.settle()
        model.step_gate.let(1)
        assert (await other.done("g"))["finish_reason"] == "cancelled"
        assert model.frees("g") == 1


async def test_after_a_cancel_a_resume_gets_the_done_and_not_one_token(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        model.step_gate.let(2)
        await client.until("token")
        await client.send(type="cancel", id="g")
        await client.settle()
        await cut(client)
        await unheard(server)
        await other.resume(client, "g", after_seq=1)
        await other.until("resumed")
        model.open()
        done = await other.done("g")
        assert done["finish_reason"] == "cancelled"
        assert done["timings"]["cancel_ms"] > 0
        assert not other.of("g", "token")


async def test_a_cancel_read_during_the_replay_of_what_has_ended_makes_the_done_cancelled(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client, slow_client(server) as other:
        await begun(client, model, prompt=WIDE * 60, ignore_eos=True, max_tokens=1000)
        await cut(client)
        model.open()
        await model.freed_of("g")
        other.socket.transport.pause_reading()
        await other.resume(client, "g")
        await eventually(lambda: not no_listener(server))
        await other.send(type="cancel", id="g")
        await eventually(lambda: server.server.resumables.size < 100_000)  # the tokens are dropped
        other.socket.transport.resume_reading()
        done = await other.done("g")
        assert done["finish_reason"] == "cancelled"
        assert other.asked("g").next_seq < 1000
        # And so it is for whoever asks once more.
        await other.resume(client, "g", after_seq=0)
        assert (await other.until("done"))["finish_reason"] == "cancelled"


# Bounds.


async def test_while_nobody_listens_a_generation_ends_at_the_bound_of_tokens() -> None:
    async with scripted(max_detached_tokens=20) as (server, model), server.client() as client, server.client() as other:
        await begun(client, model, ignore_eos=True)
        await cut(client)
        await unheard(server)
        # One permit a turn of the loop, so that the end may come between two steps.
        await eventually(lambda: model.step_gate.let() or model.frees("g") == 1)
        await other.resume(client, "g")
        done = await other.done("g")
        assert done["finish_reason"] == "length"
        assert "cancel_ms" not in done["timings"]
        assert (TEXT * 1000).startswith(other.checker.texts["g"])
        assert other.asked("g").next_seq >= 3 + 20
        assert done["usage"]["completion_tokens"] >= 3 + 20


async def test_a_listener_who_comes_in_time_starts_the_bound_anew() -> None:
    async with scripted(max_detached_tokens=20) as (server, model), contextlib.AsyncExitStack() as clients:
        client = await clients.enter_async_context(server.client())
        await begun(client, model)
        for _ in range(3):
            await cut(client)
            await unheard(server)
            model.step_gate.let(15)
            await model.in_step(len(model.steps) + 15)
            before, client = client, await clients.enter_async_context(server.client())
            await client.resume(before, "g")
            await client.until("token")
        model.open()
        assert (await client.done("g"))["finish_reason"] == "stop"
        assert client.checker.texts["g"] == TEXT


async def test_when_the_window_is_over_a_generation_nobody_came_back_for_ends_and_is_forgotten() -> None:
    async with scripted(resume_window=0.05) as (server, model), server.client() as client, server.client() as other:
        await begun(client, model, ignore_eos=True)
        await cut(client)
        await eventually(lambda: model.step_gate.let() or model.frees("g") == 1)
        await nothing_left(server, model)
        await other.resume(client, "g")
        assert (await other.until("error"))["code"] == "resume_expired"


async def test_when_the_window_is_over_an_ended_generation_is_forgotten() -> None:
    async with scripted(resume_window=0.05) as (server, model), server.client() as client:
        model.open()
        await client.send(type="generate", id="g", prompt=TEXT, resumable=True)
        await client.done("g")
        await nothing_left(server, model)
        await client.resume(client, "g")
        assert (await client.until("error"))["code"] == "resume_expired"


async def test_the_window_does_not_run_while_somebody_listens() -> None:
    async with scripted(resume_window=0.05) as (server, model), server.client() as client, server.client() as other:
        await begun(client, model)
        await cut(client)
        await other.resume(client, "g")
        await other.until("resumed")
        expired = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.15, expired.set_result, None)
        await expired
        model.open()
        assert (await other.done("g"))["finish_reason"] == "stop"


async def test_when_memory_runs_out_ended_answers_go_first_then_those_that_nobody_hears() -> None:
    async with (
        scripted(max_resume_bytes=30_000) as (server, model),
        server.client() as client,
        server.client() as lost,
        server.client() as other,
    ):
        model.step_gate.let(3)
        await client.send(type="generate", id="ended", prompt="abc", max_tokens=3, resumable=True)
        await client.done("ended")
        await begun(lost, model, id="lost")
        await cut(lost)
        await unheard(server)
        await begun(client, model, id="heard", busy=server, prompt=WIDE * 20)
        # The first two have gone; what is heard goes on, and is no longer kept.
        for _ in range(5):
            model.step_gate.let(1)
            await client.until("token")
        assert model.frees("lost") == 1
        for id, before in (("ended", client), ("lost", lost)):
            await other.resume(before, id, after_seq=0)
            assert (await other.until("error"))["code"] == "resume_expired"
        assert server.server.resumables.size <= 30_000
        model.open()
        await client.done("heard")
        assert client.checker.texts["heard"] == WIDE * 20
        assert server.server.resumables.size <= 30_000


# Readers that are slow, and answers that are large.


async def test_a_replay_larger_than_the_outbox_comes_whole_as_fast_as_it_is_read() -> None:
    async with (
        scripted(max_outbox_bytes=150_000) as (server, model),
        server.client() as client,
        slow_client(server) as other,
    ):
        await begun(client, model, prompt=WIDE * 60, ignore_eos=True, max_tokens=305)
        await cut(client)
        await unheard(server)
        await step_by_step(model, 300)
        model.open()
        await model.freed_of("g")
        other.socket.transport.pause_reading()
        await other.resume(client, "g")
        await eventually(lambda: not no_listener(server))
        other.socket.transport.resume_reading()
        await other.done("g")
        assert other.checker.texts["g"] == WIDE * 300


async def replaying(server: Running, model: ScriptedModel, client: Client, slow: Client) -> None:
    """Stand in the middle of a long replay to a client that does not read."""
    await begun(client, model, prompt=WIDE * 60, ignore_eos=True, max_tokens=600)
    await cut(client)
    await unheard(server)
    await step_by_step(model, 590)
    model.open()
    await model.freed_of("g")
    slow.socket.transport.pause_reading()
    await slow.resume(client, "g")
    await eventually(lambda: any(job.needs_transcript for job in server.server.resumables))


async def test_a_client_that_takes_over_in_the_middle_of_anothers_replay_gets_everything() -> None:
    async with (
        scripted() as (server, model),
        server.client() as client,
        server.client() as other,
        slow_client(server) as slow,
    ):
        await replaying(server, model, client, slow)
        await other.resume(client, "g")
        assert (await other.done("g"))["finish_reason"] == "length"
        assert other.checker.texts["g"] == WIDE * 591
        slow.socket.transport.resume_reading()
        await slow.until("detached")
        assert (await slow.settle())["connection"]["active"] == []


async def test_one_that_outgrew_the_memory_while_it_was_read_may_be_taken_over_and_goes_on() -> None:
    async with (
        scripted(max_resume_bytes=320 * len(WIDE)) as (server, model),
        server.client() as client,
        server.client() as other,
        slow_client(server) as slow,
    ):
        await begun(client, model, prompt=WIDE * 60, ignore_eos=True, max_tokens=600)
        await cut(client)
        await unheard(server)
        await step_by_step(model, 250)
        slow.socket.transport.pause_reading()
        await slow.resume(client, "g")
        await eventually(lambda: any(job.needs_transcript for job in server.server.resumables))
        await step_by_step(model, 200)
        assert server.server.resumables.size > 320 * len(WIDE)
        await other.resume(client, "g")
        model.open()
        assert (await other.done("g"))["finish_reason"] == "length"
        assert other.checker.texts["g"] == WIDE * 591


async def test_a_client_that_is_lost_in_the_middle_of_its_replay_may_be_followed_by_another() -> None:
    async with scripted() as (server, model), server.client() as client, server.client() as other:
        async with slow_client(server) as slow:
            await replaying(server, model, client, slow)
            await cut(slow)
        await unheard(server)
        await other.resume(client, "g")
        assert (await other.done("g"))["finish_reason"] == "length"
        assert other.checker.texts["g"] == WIDE * 591


async def test_a_reader_closed_as_too_slow_may_resume_and_gets_everything() -> None:
    async with scripted(max_outbox_bytes=50_000) as (server, model), server.client() as other:
        async with slow_client(server) as client:
            client.socket.transport.pause_reading()
            ignoring_its_end = {"ignore_eos": True, "max_tokens": 101}
            await client.send(type="generate", id="g", prompt=WIDE * 50, resumable=True, **ignoring_its_end)
            await step_by_step(model, 100)
            assert len(server.server.resumables) == 1
            assert no_listener(server)
            model.open()
            client.socket.transport.resume_reading()
            assert await closing_code(client) == 4413
        await other.resume(client, "g")
        await other.done("g")
        assert other.checker.texts["g"] == WIDE * 100


async def test_an_answer_that_is_not_streamed_is_resumed_to_its_done(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model, 0, stream=False, logprobs=0)
        await cut(client)
        await unheard(server)
        await other.resume(client, "g")
        await other.until("resumed")
        model.open()
        done = await other.done("g")
        assert (done["text"], len(done["logprobs"])) == (TEXT, 64)


async def test_an_answer_with_log_probabilities_is_replayed_with_them(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model, logprobs=2)
        await cut(client)
        model.open()
        await model.freed_of("g")
        await other.resume(client, "g")
        await other.done("g")
        assert other.checker.texts["g"] == TEXT
        assert sum(len(frame["logprobs"]) for frame in other.of("g", "token")) == 61


async def test_in_the_middle_of_a_long_prefill_a_generation_is_resumed_and_its_progress_told(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await client.send(type="generate", id="g", prompt="x" * 1500, resumable=True, max_tokens=2)
        await client.until("started")
        await cut(client)
        await unheard(server)
        await other.resume(client, "g")
        await other.until("resumed")
        model.open()
        await other.done("g")
        assert other.checker.texts["g"] == "xx"


# The server's end, and its failures.


async def test_a_step_that_fails_while_nobody_listens_is_told_to_who_resumes(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client, server.client() as other:
        await begun(client, model)
        model.step_errors[len(model.steps) + 2] = RuntimeError("a step failed")
        await cut(client)
        await unheard(server)
        model.open()
        await model.freed_of("g")
        await other.resume(client, "g")
        done = await other.done("g")
        assert (done["finish_reason"], done["error"]["code"]) == ("error", "internal")


async def test_during_a_drain_it_may_be_resumed_and_ends_with_the_server() -> None:
    async with (
        scripted(drain_timeout=60.0) as (server, model),
        server.client() as client,
        server.client() as other,
        server.client() as busy,
    ):
        await begun(client, model)
        await begun(busy, model, id="busy", busy=server, prompt="busy with this")
        await cut(client)
        await unheard_but(server, "busy")
        drain = asyncio.create_task(server.server.drain())
        await other.until("goaway")
        await other.resume(client, "g")
        await other.until("resumed")
        model.open()
        assert (await other.done("g"))["finish_reason"] == "stop"
        await busy.done("busy")
        assert await closing_code(other) == 1012
        await drain


async def unheard_but(server: Running, id: str) -> None:
    await eventually(lambda: all(job.listener is None for job in server.server.resumables if job.id != id))


async def test_a_drain_does_not_wait_for_what_nobody_hears(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as client:
        await begun(client, model)
        await cut(client)
        await unheard(server)
    async with asyncio.timeout(10):
        await server.server.drain()
    await server.server.__aexit__(None, None, None)
    model.step_gate.let(1)
    await nothing_left(server, model)


@pytest.mark.parametrize("leave", [cut, Client.aclose], ids=["cut", "closed"])
async def test_nothing_is_left_of_many_that_came_and_went(leave: Callable[[Client], Any]) -> None:
    async with running(resume_window=0.05) as server:
        tasks = asyncio.all_tasks()
        for _ in range(20):
            async with server.client() as client:
                await client.send(type="generate", id="g", prompt=TEXT * 20, resumable=True)
                await client.until("token", "done")
                await leave(client)
        await eventually(lambda: len(server.server.resumables) == 0)
        await eventually(lambda: asyncio.all_tasks() <= tasks)
        assert server.server.resumables.size == 0


async def test_models_of_other_names_may_be_resumed_from_any_connection(stage: tuple[Running, ScriptedModel]) -> None:
    server, _ = stage
    model = put(server.models, "test/other")
    async with server.client() as client, server.client() as other:
        await client.send(type="init", model="test/other")
        await client.until("ready")
        await begun(client, model)
        await cut(client)
        await other.resume(client, "g")
        await other.until("resumed")
        model.open()
        await other.done("g")
        assert other.checker.texts["g"] == TEXT
