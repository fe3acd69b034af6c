"""The Python client when its connection is lost: what goes on, what is asked for anew, and what its user is told."""

import asyncio

import pytest

from tests.conftest import ECHO, eventually
from tests.scripted import in_engine, put
from tests.stage import MORE, MOST, TEXT, Stage, read, staged
from wsserver.client import ConnectionLost, ServerError, connect


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


@pytest.mark.parametrize("loads", ["ready", "loading"])
async def test_what_waits_for_an_earlier_model_is_asked_of_that_one_again(loads: str) -> None:
    async with staged(max_active=1) as stage, stage.connect() as server:
        more, most = put(stage.server.models, MORE), put(stage.server.models, MOST)
        if loads == "loading":
            most.load_gate.shut()
        answers = [server.generate(prompt=prompt) for prompt in ("first", "second")]
        texts = [asyncio.create_task(answer.text()) for answer in answers]
        await in_engine(stage.server, 2)
        await server.init(MORE)
        texts += [asyncio.create_task(server.generate(prompt=prompt).text()) for prompt in ("third", "fourth")]
        await in_engine(stage.server, 4)
        load = asyncio.create_task(server.init(MOST))
        await (most.in_load_stage(1) if loads == "loading" else load)
        texts += [asyncio.create_task(server.generate(prompt="fifth").text())]
        await in_engine(stage.server, 5)
        await server.status()  # so that what has started is known to have
        await stage.lose_and_regain()
        for model in (stage.model, more, most):
            model.open()
        assert await asyncio.gather(*texts) == ["first", "second", "third", "fourth", "fifth"]
        assert (await load).model.id == MOST
        assert [len(model.steps) for model in (stage.model, more, most)] == [13, 13, 6]
        assert await server.generate(prompt="sixth").text() == "sixth"
        assert len(most.steps) == 12


async def test_what_waits_for_a_load_that_was_cancelled_is_asked_of_no_other_model(stage: Stage) -> None:
    more = put(stage.server.models, MORE)
    more.load_gate.shut()
    async with stage.connect() as server:
        load = asyncio.create_task(server.init(MORE))
        await more.in_load_stage(1)
        text = asyncio.create_task(server.generate(prompt="hi").text())
        await in_engine(stage.server, 1)
        load.cancel()
        await asyncio.wait([load])
        await server.status()  # so that its end was heard
        await stage.lose_and_regain()
        with pytest.raises(ServerError, match="cancelled"):
            await text
        assert stage.model.steps == []
        more.open()


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


async def test_what_the_server_has_forgotten_is_not_asked_of_another_model(stage: Stage) -> None:
    more = put(stage.server.models, MORE)
    async with stage.connect() as server:
        unread = asyncio.create_task(server.generate(prompt="new").text())
        await in_engine(stage.server, 1)
        await server.init(MORE)
        await stage.lose()
        for job in list(stage.server.server.resumables):
            stage.server.server.resumables.forget(job)
        stage.may_dial.set()
        with pytest.raises(ServerError, match="another model was chosen"):
            await unread
        assert more.steps == []
        stage.model.open()


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
