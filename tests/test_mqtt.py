"""The server over a real broker: what is answered, where, and what a bad message does."""

import asyncio
import time

import orjson
import pytest

from tests.conftest import eventually
from tests.mosquitto import ROOT, Mosquitto, device, needs_mosquitto, serving
from tests.scripted import WIDE, put
from wsserver_mqtt.topics import Topics

pytestmark = needs_mosquitto


# Answers.


async def test_an_answer_streams_to_the_response_topic_and_its_done_has_it_whole(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        model.open()
        done = await client.generate(id="g", prompt="Once upon a time")
        assert (done["joined"], done["text"], done["finish_reason"]) == ("Once upon a time", "Once upon a time", "stop")
        assert [frame["type"] for frame in client.frames][:2] == ["started", "token"]


async def test_only_ends_are_delivered_at_least_once(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        model.open()
        await client.generate(id="g", prompt="hello")
        await client.settle()
        qos = {frame["type"]: message.qos for frame, message in zip(client.frames, client.messages, strict=True)}
        assert qos == {"started": 0, "token": 0, "done": 1, "status": 1}


async def test_every_frame_has_the_correlation_data_of_what_it_answers(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        for name in ("a", "b"):
            await client.send(f"for {name}".encode(), type="generate", id=name, prompt="hello")
        await client.send(b"for the cancel", type="cancel", id="unknown")
        model.open()
        for name in ("a", "b"):
            await client.done(name)
        told = {
            (frame["id"], message.properties.CorrelationData)
            for frame, message in zip(client.frames, client.messages, strict=True)
            if message.properties
        }
        assert told == {("a", b"for a"), ("b", b"for b"), ("unknown", b"for the cancel")}


async def test_a_request_without_an_id_is_given_one(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        model.open()
        await client.send(b"mine", type="generate", prompt="hello")
        done = await client.until("done")
        assert (done["id"], done["text"]) == ("auto-1", "hello")
        assert client.messages[-1].properties.CorrelationData == b"mine"


async def test_an_answer_that_is_not_streamed_is_in_its_done_alone(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        model.open()
        done = await client.generate(id="g", prompt="hello", stream=False)
        assert (done["text"], client.of("g", "token")) == ("hello", [])


async def test_tokens_merge_to_one_message_an_interval_and_the_first_is_sent_at_once(broker: Mosquitto) -> None:
    async with serving(broker, mqtt_interval=3600) as (_, model, _), device(broker) as client:
        await client.send(type="generate", id="g", prompt="hello")
        model.step_gate.let(1)
        await client.until("token")
        model.open()
        await client.until("done")
        assert [(f["seq"], f["n"], f["text"]) for f in client.of("g", "token")] == [(0, 1, "h"), (1, 4, "ello")]


async def test_clients_stream_at_once_and_ids_are_their_own(broker: Mosquitto) -> None:
    async def ask(name: str) -> str:
        async with device(broker, name) as client:
            return str((await client.generate(id="g", prompt=f"I am {name}"))["joined"])

    async with serving(broker, max_active=50) as (_, model, _):
        model.open()
        names = [f"client-{number}" for number in range(50)]
        assert await asyncio.gather(*map(ask, names)) == [f"I am {name}" for name in names]


async def test_an_init_chooses_the_model_of_what_follows_at_its_topic_only(broker: Mosquitto) -> None:
    async with serving(broker) as (server, model, _), device(broker) as client, device(broker, "other") as other:
        model.open()
        put(server.models, "test/second").open()
        await client.send(type="init", id="load", model="test/second")
        assert (await client.until("ready"))["model"]["id"] == "test/second"
        await client.generate(id="g", prompt="hello")
        await other.generate(id="g", prompt="hello")
        assert client.of("g", "started")[0]["model"] == "test/second"
        assert other.of("g", "started")[0]["model"] == "wsserver/echo"


async def test_a_generation_is_resumed_over_mqtt_that_was_begun_over_a_websocket(broker: Mosquitto) -> None:
    async with serving(broker) as (server, model, _), device(broker) as client:
        async with server.client() as before:
            await before.send(type="generate", id="g", prompt="hello", resumable=True)
            model.step_gate.let(2)
            await before.until("token")
            started = before.of("g", "started")[0]
        client.checker.resumable = server.resumable
        await client.send(type="resume", id="g", resume_token=started["resume_token"])
        model.open()
        done = await client.until("done")
        assert (done["text"], done["finish_reason"]) == ("hello", "stop")


# MQTT 3.1.1.


async def test_a_client_of_mqtt_3_names_its_topic_in_the_payload(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker, modern=False) as client:
        model.open()
        assert (await client.generate(id="g", prompt="hello"))["text"] == "hello"
        await client.settle()


# Cancels.


async def test_a_cancel_ends_a_stream_and_its_done_has_what_there_was(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        await client.send(type="generate", id="g", prompt="hello")
        model.step_gate.let(1)
        await client.until("token")
        await client.send(type="cancel", id="g")
        await client.settle()
        model.open()
        done = await client.until("done")
        assert (done["finish_reason"], done["text"][:1]) == ("cancelled", "h")
        assert done["timings"]["cancel_ms"] >= 0
        await model.freed_of("g")


@pytest.mark.parametrize("modern", [True, False])
async def test_a_cancel_without_a_payload_or_without_an_id_ends_everything_of_its_topic(
    broker: Mosquitto, modern: bool
) -> None:
    async with serving(broker) as (_, model, _), device(broker, modern=modern) as client, device(broker, "other") as other:
        for each in (client, other):
            for id in "ab":
                await each.send(type="generate", id=id, prompt="hello")
            await each.settle()
        await client.send(type="cancel")
        model.open()
        ends = {(await client.until("done"))["finish_reason"] for _ in range(2)}
        assert ends == {"cancelled"}
        assert {(await other.until("done"))["finish_reason"] for _ in range(2)} == {"stop"}
        if modern:
            await client.send(type="generate", id="c", prompt="x" * 1000)
            client.checker.sent({"type": "cancel"})
            await client.publish(f"{ROOT}/cancel", b"")
            assert (await client.until("done"))["finish_reason"] in ("cancelled", "stop")


async def test_at_the_topic_for_cancels_nothing_else_is_taken(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        client.checker.sent({"id": ""})
        await client.publish(f"{ROOT}/cancel", b'{"type":"generate","id":"g","prompt":"hello"}')
        error = await client.until("error")
        assert (error["code"], error["message"]) == ("bad_message", "$.type: this topic is for cancels")
        assert model.steps == []


# The same twice.


async def test_a_request_delivered_twice_runs_once(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        message = orjson.dumps({"type": "generate", "id": "g", "prompt": "hello"})
        client.checker.sent(orjson.loads(message))
        for _ in range(2):
            await client.publish(f"{ROOT}/request", message)
        await client.settle()
        model.open()
        await client.until("done")
        assert [frame["type"] for frame in client.of("g") if frame["type"] != "token"] == ["started", "done"]


async def test_who_asks_the_same_again_is_given_the_answer_again(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        model.open()
        first = await client.generate(id="g", prompt="hello")
        steps = len(model.steps)
        await client.send(b"again", type="generate", id="g", prompt="hello")
        client.checker.open["g"][0].text = "hello"
        client.checker.open["g"][0].last = "token"
        second = await client.until("done")
        assert {**second, "joined": "hello"} == first
        assert client.messages[-1].properties.CorrelationData == b"again"
        assert len(model.steps) == steps


async def test_the_same_id_in_other_words_is_a_request_of_its_own(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        await client.send(type="generate", id="g", prompt="hello")
        await client.send(type="generate", id="g", prompt="goodbye")
        assert (await client.until("error"))["code"] == "duplicate_id"
        model.open()
        assert (await client.until("done"))["text"] == "hello"
        assert (await client.generate(id="g", prompt="goodbye"))["text"] == "goodbye"


async def test_what_was_refused_is_tried_anew(broker: Mosquitto) -> None:
    async with serving(broker, max_requests_per_connection=1) as (_, model, _), device(broker) as client:
        await client.send(type="generate", id="a", prompt="hello")
        await client.send(type="generate", id="b", prompt="hello")
        assert (await client.until("done"))["error"]["code"] == "overloaded"
        model.open()
        await client.until("done", id="a")
        assert (await client.generate(id="b", prompt="hello"))["text"] == "hello"


# What is not answered.


@pytest.mark.parametrize(
    "reply",
    [
        "elsewhere",
        f"{ROOT}/status",
        f"{ROOT}/request",
        f"{ROOT}/reply/",
        f"{ROOT}/replying/me",
        f"{ROOT}/reply/\u0001",
        f"{ROOT}/reply/+",
        f"{ROOT}/reply/#",
        f"{ROOT}/reply/{'x' * 2000}",
        f"{ROOT}/reply/{'/' * 300}",
        "$SYS/me",
        7,
        None,
    ],
)
async def test_a_topic_for_answers_that_is_not_allowed_gets_none_and_nothing_runs(
    broker: Mosquitto, reply: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wsserver_mqtt")
    async with serving(broker) as (_, model, _), device(broker, modern=False) as client:
        message = {"type": "generate", "id": "g", "prompt": "hello", "reply_to": reply}
        await client.publish(f"{ROOT}/request", orjson.dumps(message))
        await client.settle()
        assert model.steps == []
        assert [record.getMessage() for record in caplog.records if "is not answered" in record.getMessage()]


async def test_other_topics_for_answers_are_the_operators_to_allow(broker: Mosquitto) -> None:
    topics = Topics(ROOT, ("devices/answers",))
    async with serving(broker, topics=topics) as (_, model, _), device(broker, reply="devices/answers/lamp") as client:
        model.open()
        assert (await client.generate(id="g", prompt="hello"))["text"] == "hello"


async def test_who_asks_below_a_name_is_answered_below_that_name_only(broker: Mosquitto) -> None:
    message = b'{"type":"generate","id":"g","prompt":"hello"}'
    async with serving(broker) as (_, model, _), device(broker, "alice/phone") as alice, device(broker, "bob/phone") as bob:
        model.open()
        await bob.publish(f"{ROOT}/request/alice", message)
        alice.checker.sent(orjson.loads(message))
        await alice.publish(f"{ROOT}/request/alice", message)
        assert (await alice.until("done"))["text"] == "hello"
        await bob.settle()
        assert [frame["type"] for frame in bob.frames] == ["status"]


async def test_a_retained_request_is_nobodys(broker: Mosquitto) -> None:
    async with device(broker) as client:
        message = orjson.dumps(client.addressed({"type": "generate", "prompt": "hello", "reply_to": client.reply}))
        await client.client.publish(f"{ROOT}/request", message, qos=1, retain=True)
        async with serving(broker) as (_, model, _):
            await client.settle()
            assert model.steps == []


# Bad messages.


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"no json", "bad_json"),
        (b"\xff\xfe", "bad_message"),
        (b"[" * 100_000, "bad_json"),
        (b"[" * 500 + b"]" * 500, "bad_json"),
        (b'["a list"]', "bad_message"),
        (b'{"type":"sing"}', "unknown_type"),
        (b'{"type":"generate","id":"","prompt":"x"}', "bad_message"),
        (b'{"type":"init","model":7}', "bad_message"),
        (b"", "bad_json"),
        (b" " * 300_000, "bad_message"),
    ],
)
async def test_a_malformed_payload_is_answered_by_an_error(broker: Mosquitto, payload: bytes, code: str) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        client.checker.sent({"id": ""})
        await client.publish(f"{ROOT}/request", payload)
        assert (await client.until("error"))["code"] == code
        model.open()
        assert (await client.generate(id="g", prompt="hello"))["text"] == "hello"


async def test_a_bad_parameter_is_answered_by_a_done(broker: Mosquitto) -> None:
    async with serving(broker) as (_, _, _), device(broker) as client:
        done = await client.generate(id="g", prompt="hello", temperature=-1)
        assert (done["error"]["code"], done["finish_reason"]) == ("bad_message", "error")


async def test_a_payload_far_too_long_is_not_even_delivered(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        await client.publish(f"{ROOT}/request", b" " * 1_000_000)
        await client.settle()
        assert [frame["type"] for frame in client.frames] == ["status"]
        assert model.steps == []


async def test_one_who_sends_nonsense_only_is_not_answered_for_ever(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        for _ in range(50):
            await client.publish(f"{ROOT}/request", b"no json")
        model.open()
        assert (await client.generate(id="g", prompt="hello"))["text"] == "hello"
        assert len([frame for frame in client.frames if frame["type"] == "error"]) == 32


# Expiry.


async def seconds_pass(seconds: float) -> None:
    """Let time go by where it is the broker's, or an expiry's, which are whole seconds."""
    over = time.monotonic() + seconds
    await eventually(lambda: time.monotonic() > over)


async def test_a_request_that_waits_longer_than_it_is_valid_never_runs(broker: Mosquitto) -> None:
    async with serving(broker, max_active=1) as (_, model, _), device(broker) as client:
        await client.send(type="generate", id="long", prompt="hello")
        await model.in_step(1)
        await client.send(expires_in=1, type="generate", id="late", prompt="goodbye")
        client.checker.sent({"type": "cancel", "id": "late"})  # in effect
        await client.settle()
        await seconds_pass(1.1)
        model.open()
        assert (await client.done("late"))["finish_reason"] == "cancelled"
        assert (await client.done("long"))["finish_reason"] == "stop"
        assert model.steps_of("late") == []


async def test_a_request_that_has_started_does_not_expire(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, _), device(broker) as client:
        await client.send(expires_in=1, type="generate", id="g", prompt="hello")
        await client.until("started")
        await seconds_pass(1.1)
        model.open()
        assert (await client.until("done"))["finish_reason"] == "stop"


# Slow ones.


async def test_a_slow_subscriber_loses_tokens_at_most_and_holds_up_nobody(broker: Mosquitto) -> None:
    room = {"mqtt_interval": 0, "max_message_bytes": 4 << 20, "max_outbox_bytes": 8 << 20}
    async with serving(broker, **room) as (_, model, _), device(broker) as client, device(broker, "slow") as slow:
        loop, sock = asyncio.get_running_loop(), slow.client._client.socket()
        await slow.send(type="generate", id="g", prompt=WIDE * 500)
        loop.remove_reader(sock.fileno())
        model.open()
        for number in range(3):
            assert (await client.generate(id=f"g{number}", prompt="hello"))["text"] == "hello"
        await model.freed_of("g")
        loop.add_reader(sock.fileno(), slow.client._client.loop_read)
        message = await anext(aiter(slow.client.messages))
        while (frame := orjson.loads(message.payload))["type"] != "done":
            message = await anext(aiter(slow.client.messages))
        assert frame["text"] == WIDE * 500
