import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from tests.conftest import Client, Running, eventually
from tests.scripted import WIDE, ScriptedModel, closing_code, in_engine, put, scripted, slow_client
from wsserver.connection import MAX_UNREAD_FRAMES

# What is sent, the code that answers it, and how the message begins: with the field that is wrong.
ANSWERED_WITH_ERROR = [
    ("{", "bad_json", ""),
    ("", "bad_json", ""),
    ("\0", "bad_json", ""),
    ('{"type":"status"} {}', "bad_json", ""),
    ("[" * 2000 + "]" * 2000, "bad_json", ""),
    ('{"type":"status","x":' + "[" * 2000 + "]" * 2000 + "}", "bad_json", ""),
    ('{"type":"generate","prompt":"\\ud800"}', "bad_json", ""),
    ('{"type":"generate","prompt":"a","temperature":NaN}', "bad_json", ""),
    ('{"type":"generate","prompt":"a","temperature":Infinity}', "bad_json", ""),
    ('{"type":"generate","prompt":"a","max_tokens":1e400}', "bad_json", ""),
    ("null", "bad_message", "$.type"),
    ('"generate"', "bad_message", "$.type"),
    ('[{"type":"status"}]', "bad_message", "$.type"),
    ("18446744073709551616", "bad_message", "$.type"),
    ("{}", "bad_message", "$.type"),
    ('{"type":null}', "bad_message", "$.type"),
    ('{"type":' + "[" * 63 + "]" * 63 + "}", "bad_message", "$.type"),
    ('{"type":' + "[" * 64 + "]" * 64 + "}", "bad_json", "the frame nests more than 64 levels"),
    ('{"x":' * 65 + "1" + "}" * 65, "bad_json", "the frame nests more than 64 levels"),
    ('{"type":"shutdown"}', "unknown_type", "$.type"),
    ('{"type":"Generate","prompt":"a"}', "unknown_type", "$.type"),
    ('{"type":"done","id":"g"}', "unknown_type", "$.type"),
    ('{"type":"generate","id":"","prompt":"a"}', "bad_message", "$.id"),
    ('{"type":"generate","id":7,"prompt":"a"}', "bad_message", "$.id"),
    ('{"type":"generate","id":"' + "i" * 129 + '","prompt":"a"}', "bad_message", "$.id"),
    ('{"type":"cancel","id":["g"]}', "bad_message", "$.id"),
    ('{"type":"cancel","id":18446744073709551616}', "bad_message", "$.id"),
    ('{"type":"init","model":7}', "bad_message", "$.model"),
    ('{"type":"init","id":"load","model":""}', "bad_message", "$.model"),
    ('{"type":"init","device":"tpu"}', "bad_message", "$.device"),
    ('{"type":"init","device":"cuda:-1"}', "bad_message", "$.device"),
    ('{"type":"init","dtype":"float64"}', "bad_message", "$.dtype"),
    ('{"type":"init","quantization":"int4"}', "bad_message", "$.quantization"),
    ('{"type":"init","model":"../../etc"}', "model_not_found", "$.model"),
    ('{"type":"init","id":"load","model":"meta-llama/Llama-3.1-8B"}', "model_not_found", "$.model"),
    ('{"type":"generate","id":"running","prompt":"again"}', "duplicate_id", "$.id"),
    ('{"type":"init","id":"running"}', "duplicate_id", "$.id"),
    ('{"type":"generate","id":"running","prompt":"a","messages":[]}', "bad_message", "$.messages"),
    ('{"type":"cancel","id":"nobody"}', "not_active", "$.id"),
]

# The fields of a generate that make it one to refuse, and how the message begins.
ANSWERED_WITH_DONE = [
    ("", "$"),
    ('"prompt":"a","messages":[{"role":"user","content":"b"}]', "$"),
    ('"prompt":null,"messages":null', "$"),
    ('"messages":[]', "$.messages"),
    ('"messages":"hello"', "$.messages"),
    ('"messages":[{"role":"wizard","content":"a"}]', "$.messages[0].role"),
    ('"messages":[{"role":"user"}]', "$.messages[0]"),
    ('"messages":[{"role":"user","content":7}]', "$.messages[0].content"),
    ('"prompt":""', "$.prompt"),
    ('"prompt":["a"]', "$.prompt"),
    *((f'"prompt":"a","temperature":{value}', "$.temperature") for value in ("-0.1", "1e300", '"hot"', "true")),
    *((f'"prompt":"a","max_tokens":{value}', "$.max_tokens") for value in ("0", "-1", "1.5", "4294967296")),
    *((f'"prompt":"a","seed":{value}', "$.seed") for value in ("-1", "9223372036854775808", "18446744073709551616")),
    *((f'"prompt":"a","top_p":{value}', "$.top_p") for value in ("0", "-1", "1.01")),
    ('"prompt":"a","min_p":2', "$.min_p"),
    ('"prompt":"a","top_k":-1', "$.top_k"),
    ('"prompt":"a","min_tokens":-1', "$.min_tokens"),
    ('"prompt":"a","repetition_penalty":0', "$.repetition_penalty"),
    ('"prompt":"a","presence_penalty":-2.5', "$.presence_penalty"),
    ('"prompt":"a","frequency_penalty":2.5', "$.frequency_penalty"),
    ('"prompt":"a","stop":""', "$.stop"),
    ('"prompt":"a","stop":[' + ",".join(['"s"'] * 17) + "]", "$.stop"),
    ('"prompt":"a","stop":{}', "$.stop"),
    ('"prompt":"a","stop_token_ids":[-1]', "$.stop_token_ids[0]"),
    ('"prompt":"a","stop_token_ids":[100000]', "$.stop_token_ids"),
    ('"prompt":"a","logit_bias":{"x":1}', "$.logit_bias"),
    ('"prompt":"a","logit_bias":{"1":1000}', "$.logit_bias[...]"),
    ('"prompt":"a","logit_bias":{"100000":1}', "$.logit_bias"),
    ('"prompt":"a","logprobs":21', "$.logprobs"),
    ('"prompt":"a","stream":"no"', "$.stream"),
    ('"prompt":"a","ignore_eos":1', "$.ignore_eos"),
]


@pytest.fixture
async def stage() -> AsyncIterator[tuple[Running, ScriptedModel]]:
    async with scripted() as stage:
        yield stage


async def finish_untouched(client: Client, model: ScriptedModel) -> None:
    """Let "running" run to its end: nothing that came before may have cost it a token."""
    model.open()
    done = await client.until("done", id="running")
    assert (done["finish_reason"], client.checker.texts["running"]) == ("stop", "left alone")
    assert (await client.settle())["connection"]["active"] == []
    client.checker.quiet()


async def start_running(client: Client, model: ScriptedModel) -> None:
    await client.send(type="generate", id="running", prompt="left alone")
    model.step_gate.let(3)
    await model.in_step(4)


@pytest.mark.parametrize(("text", "code", "about"), ANSWERED_WITH_ERROR, ids=range(len(ANSWERED_WITH_ERROR)))
async def test_a_bad_message_gets_its_error_and_the_running_generation_goes_on(
    stage: tuple[Running, ScriptedModel], text: str, code: str, about: str
) -> None:
    server, model = stage
    async with server.client() as client:
        await start_running(client, model)
        await client.send_text(text)
        error = await client.until("error")
        assert error["code"] == code
        assert error["message"].startswith(about)
        await finish_untouched(client, model)
        assert [frame["type"] for frame in client.frames].count("error") == 1


@pytest.mark.parametrize(("fields", "about"), ANSWERED_WITH_DONE, ids=range(len(ANSWERED_WITH_DONE)))
@pytest.mark.parametrize("id", ['"id":"bad",', '"id":null,', ""])
async def test_a_bad_generate_gets_its_done_and_the_running_generation_goes_on(
    stage: tuple[Running, ScriptedModel], id: str, fields: str, about: str
) -> None:
    server, model = stage
    async with server.client() as client:
        await start_running(client, model)
        await client.send_text('{"type":"generate",' + id + (fields or '"unknown":1') + "}")
        done = await client.until("done")
        assert done["error"]["code"] == "bad_message"
        assert done["error"]["message"].startswith(about + ":")
        assert done["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        assert (done["id"] == "bad") == ("bad" in id)
        await finish_untouched(client, model)


async def test_a_prompt_longer_than_the_context_ends_and_the_running_generation_goes_on(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with server.client() as client:
        await start_running(client, model)
        done = await client.generate(id="long", prompt="x" * 65_536)
        assert done["error"]["code"] == "context_length_exceeded"
        await finish_untouched(client, model)


async def test_an_error_repeats_nothing_of_a_broken_message_but_names_what_there_is(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, _ = stage
    async with server.client() as client:
        await client.send_text('{"type":"sesame","secret":"hunter2"}')
        error = await client.until("error")
        assert "hunter2" not in error["message"]
        assert all(kind in error["message"] for kind in ("init", "generate", "cancel", "status"))


LATE = b'{"type":"generate","id":"late","prompt":"hello"}'


def frame(opcode: Opcode, data: bytes) -> bytes:
    return Frame(opcode, data).serialize(mask=True)


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (frame(Opcode.BINARY, b"\0\1"), 1003),
        (frame(Opcode.BINARY, b'{"type":"status"}'), 1003),
        (frame(Opcode.BINARY, b""), 1003),
        (frame(Opcode.TEXT, b"\xff\xfe"), 1007),
        (frame(Opcode.TEXT, '{"type":"generate","prompt":"é"}'.encode()[:-3]), 1007),
        (frame(Opcode.TEXT, b"x" * 262_145), 1009),
        (frame(Opcode.TEXT, b"{") * 33, 4400),
        (frame(Opcode.CLOSE, b"\x03\xe8"), 1000),
    ],
    ids=["binary", "binary JSON", "empty binary", "no UTF-8", "half a character", "too long", "33 bad", "close"],
)
async def test_what_ends_a_connection_has_its_code_and_leaves_the_others_alone(
    stage: tuple[Running, ScriptedModel], wire: bytes, code: int
) -> None:
    server, model = stage
    async with server.client() as other, server.client() as client:
        await start_running(other, model)
        await client.send(type="generate", id="doomed", prompt="x" * 1000)
        await in_engine(server, 2)
        client.socket.transport.write(wire)
        assert await closing_code(client) == code
        model.step_gate.let(2)
        await in_engine(server, 1)
        await finish_untouched(other, model)
        assert not model.held()


async def test_a_message_of_10_mib_is_refused_before_it_is_read(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    async with server.client() as other:
        await start_running(other, model)
        # asyncio's own transport fails to close when the peer has gone before all was written.
        with contextlib.suppress(AttributeError):
            async with server.client() as client:
                with contextlib.suppress(ConnectionClosed):
                    await client.send_text("x" * (10 << 20))
                assert await closing_code(client) == 1009
        await finish_untouched(other, model)


async def test_a_message_as_long_as_allowed_is_served(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    model.open()
    async with server.client() as client:
        start, end = '{"type":"generate","id":"g","prompt":"hello","unknown":"', '"}'
        await client.send_text(start + "x" * (262_144 - len(start + end)) + end)
        await client.until("done")
        assert client.checker.texts == {"g": "hello"}


async def test_each_bad_message_up_to_the_limit_is_answered_and_a_good_one_forgives(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, _ = stage
    async with server.client() as client:
        for _ in range(2):
            for _ in range(32):
                await client.send_text("{")
            await client.settle()
        for _ in range(33):
            await client.send_text("{")
        assert await closing_code(client) == 4400
        assert [frame["type"] for frame in client.frames].count("error") == 3 * 32


def abort(client: Client) -> None:
    client.socket.transport.abort()


def close(client: Client) -> None:
    client.socket.transport.write(frame(Opcode.CLOSE, b"\x03\xe8"))


def end_of_file(client: Client) -> None:
    client.socket.transport.write_eof()


@pytest.mark.parametrize("leave", [abort, close, end_of_file])
async def test_a_disconnect_in_any_state_leaves_nothing_behind(leave: Callable[[Client], None]) -> None:
    async with scripted(max_active=2) as (server, model):
        loading = put(server.models, "test/loading")
        loading.load_gate.shut()
        async with server.client() as other, server.client() as warm_up:
            await start_running(other, model)
            await warm_up.settle()
            tasks = asyncio.all_tasks()
            async with server.client() as client:
                await client.send(type="generate", id="prefilling", prompt="x" * 1000)
                await in_engine(server, 2)
                model.step_gate.let(2)
                await model.in_step_of("prefilling")
                await client.send(type="generate", id="queued", prompt="y")
                await in_engine(server, 3)
                await client.send(type="init", id="load", model="test/loading")
                await client.send(type="generate", id="waiting", prompt="z")
                await loading.in_load_stage(1)
                leave(client)
                begun = len(model.steps)
                await in_engine(server, 1)
                model.step_gate.let(1)
                await model.in_step(begun + 1)
                assert model.frees("prefilling") == 1
            loading.load_gate.let(1)
            await eventually(lambda: asyncio.all_tasks() <= tasks)
            await finish_untouched(other, model)
            assert len(model.steps_of("prefilling")) <= 2
            assert not model.steps_of("queued")
            assert not loading.steps
            assert not model.held()


async def test_a_reader_that_pauses_gets_fewer_and_longer_frames_and_loses_nothing(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    async with slow_client(server) as client:
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="g", prompt=WIDE * 50, ignore_eos=True, max_tokens=152)
        model.open()
        await model.freed_of("g")
        client.socket.transport.resume_reading()
        done = await client.until("done")
        assert client.checker.texts["g"] == WIDE * 150
        tokens = client.of("g", "token")
        assert len(tokens) < 150
        assert sum(token["n"] for token in tokens) == done["usage"]["completion_tokens"] == 152


async def test_a_reader_that_is_too_slow_is_closed_and_its_work_ends_while_another_streams_on(
    stage: tuple[Running, ScriptedModel], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Were the work to go on until the socket is gone, it would go on for as long as this test may take.
    monkeypatch.setattr("wsserver.connection.CLOSE_TIMEOUT", 60.0)
    server, model = stage
    async with server.client() as other, slow_client(server) as client:
        await start_running(other, model)
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="slow", prompt=WIDE * 50, ignore_eos=True)
        await in_engine(server, 2)
        model.step_gate.let(1000)
        await eventually(lambda: "too slow" in caplog.text)
        # One permit a turn of the loop: steps go on, and the end of the work has to come between two of them.
        await eventually(lambda: model.step_gate.let() or model.frees("slow") > 0)
        assert len(model.steps_of("slow")) < 10_000
        client.socket.transport.resume_reading()
        assert await closing_code(client) == 4413
        await finish_untouched(other, model)


async def test_a_client_that_asks_faster_than_it_reads_waits_for_itself_and_gets_every_answer() -> None:
    async with scripted(messages_per_second=10_000.0) as (server, _), slow_client(server) as client:
        client.socket.transport.pause_reading()
        (connection,) = server.server._connections
        asking = asyncio.create_task(ask(client, times=5000))
        async with server.client() as other:
            for _ in range(200):
                await other.settle()
                assert len(connection._outbox) <= MAX_UNREAD_FRAMES + 1
        client.socket.transport.resume_reading()
        for _ in range(5000):
            await client.until("status")
        await asking


async def ask(client: Client, times: int) -> None:
    for _ in range(times):
        await client.send(type="status")


async def test_a_burst_of_questions_is_answered_to_the_last() -> None:
    async with scripted(messages_per_second=10_000.0) as (server, _), server.client() as client:
        client.socket.transport.write(frame(Opcode.TEXT, b'{"type":"cancel","id":"x"}') * 11_000)
        for _ in range(11_000):
            assert b"not_active" in await client.socket.recv(decode=False)


async def test_a_whole_answer_longer_than_all_that_may_wait_reaches_a_client_that_reads(
    stage: tuple[Running, ScriptedModel],
) -> None:
    server, model = stage
    model.open()
    async with server.client(max_size=None) as client:
        done = await client.generate(id="g", prompt=WIDE * 50, ignore_eos=True, max_tokens=458, stream=False)
        assert done["text"] == WIDE * 450


async def test_a_slow_reader_that_never_reads_again_is_cut_off(
    stage: tuple[Running, ScriptedModel], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.connection.CLOSE_TIMEOUT", 0.0)
    caplog.set_level(logging.DEBUG, "wsserver.server")
    server, model = stage
    async with slow_client(server) as client:
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="slow", prompt=WIDE * 50, ignore_eos=True)
        model.step_gate.let(1000)
        await eventually(lambda: "closed with" in caplog.text)
        client.socket.transport.resume_reading()
        with pytest.raises(ConnectionClosed):
            await client.until("nothing comes any more")


async def test_what_comes_after_the_message_that_closes_is_not_served(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    model.open()
    async with server.client() as other, slow_client(server) as client:
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="unread", prompt=WIDE * 60)
        await model.freed_of("unread")
        client.socket.transport.write(frame(Opcode.BINARY, b"") + frame(Opcode.TEXT, LATE))
        for _ in range(5):
            assert (await other.generate(id="g", prompt="hello"))["joined"] == "hello"
        assert not model.steps_of("late")
        client.socket.transport.resume_reading()
        assert await closing_code(client) == 1003


class Panic(BaseException):
    """What a panic in a library written in Rust looks like."""


@pytest.mark.parametrize("error", [RuntimeError("/home/secret"), Panic("/home/secret")], ids=["exception", "panic"])
async def test_a_failure_while_serving_a_request_ends_only_that_one_and_is_in_the_log(
    stage: tuple[Running, ScriptedModel], caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    server, model = stage
    async with server.client() as client:
        await start_running(client, model)
        model.encode_errors.append(error)
        await client.send(type="generate", id="unlucky", prompt="a")
        done = await client.until("done", id="unlucky")
        assert done["error"]["code"] == "internal"
        assert "secret" not in done["error"]["message"]
        [logged] = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert logged.exc_info
        assert logged.exc_info[1] is error
        assert (await client.settle())["connection"]["active"] == ["running"]
        await finish_untouched(client, model)


async def test_a_null_says_the_same_as_leaving_the_field_out(stage: tuple[Running, ScriptedModel]) -> None:
    server, model = stage
    model.open()
    async with server.client() as client:
        nothing = dict.fromkeys(("messages", "max_tokens", "temperature", "stop", "stream", "logit_bias", "logprobs"))
        assert (await client.generate(id="g", prompt="hello", **nothing))["joined"] == "hello"
