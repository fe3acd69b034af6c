"""A broker that is not there, goes and comes back, or takes nothing: what runs, what is told later, and what is bounded."""

import asyncio
from typing import cast

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

import handlers
from LLM.model_service import ModelService
from tests.conftest import eventually
from tests.mosquitto import ROOT, Mosquitto, device, needs_mosquitto, serving
from tests.scripted import WIDE
from wsserver.peer import Peer
from wsserver.protocol import Status
from wsserver_mqtt.broker import Broker, BrokerLost
from wsserver_mqtt.face import BATCH
from wsserver_mqtt.messages import Outgoing
from wsserver_mqtt.reply import Reply

pytestmark = needs_mosquitto


async def test_a_broker_that_is_not_there_yet_holds_up_nobody(broker: Mosquitto) -> None:
    await broker.stop()
    async with serving(broker, connected=False) as (server, model, face):
        model.open()
        async with server.client() as client:
            assert (await client.generate(id="g", prompt="hello"))["joined"] == "hello"
        assert not face.listening.is_set()
        await broker.start()
        await face.listening.wait()
        async with device(broker) as client:
            assert (await client.generate(id="g", prompt="hello"))["text"] == "hello"


async def test_a_server_ends_without_its_broker(broker: Mosquitto) -> None:
    await broker.stop()
    async with serving(broker, connected=False):
        pass


async def test_a_server_ends_beside_a_broker_that_hangs(broker: Mosquitto) -> None:
    async with serving(broker):
        broker.freeze()
    async with serving(broker, connected=False):
        pass
    broker.thaw()


async def test_a_stream_goes_on_while_the_broker_is_restarted_and_its_answer_is_whole(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, face):
        async with device(broker) as client:
            await client.send(b"mine", type="generate", id="g", prompt="hello")
            model.step_gate.let(2)
            await client.until("token")
            await broker.stop()
            await eventually(lambda: not face.listening.is_set())
            model.step_gate.let(1)
            await model.in_step(4)
        await broker.start()
        await face.listening.wait()
        async with device(broker) as after:
            model.open()
            message = await after.done_at_last()
            assert (message["text"], message["finish_reason"]) == ("hello", "stop")
            assert after.messages[-1].properties.CorrelationData == b"mine"
            await after.generate(id="g2", prompt="hello")


async def test_an_end_that_was_not_acknowledged_is_told_to_the_next_broker(broker: Mosquitto) -> None:
    async with serving(broker) as (_, model, face):
        async with device(broker) as client:
            await client.send(type="generate", id="g", prompt="hello")
            await client.until("started")
            broker.freeze()
            model.open()
            await model.freed_of("g")
            await broker.stop()
            await eventually(lambda: not face.listening.is_set())
        await broker.start()
        async with device(broker) as after:
            # It may have been told before this one listens; who asks the same again is told again.
            await face.listening.wait()
            await after.send(type="generate", id="g", prompt="hello")
            message = await after.done_at_last()
            assert message["text"] == "hello"
        assert len(model.steps) == 6


async def test_what_nobody_can_hear_is_cancelled_after_a_while(broker: Mosquitto) -> None:
    async with serving(broker, stall_timeout=0.1) as (_, model, face), device(broker) as client:
        await client.send(type="generate", id="g", prompt="hello")
        await client.until("started")
        await broker.stop()
        await eventually(lambda: not face.listening.is_set())
        over = asyncio.get_running_loop().time() + 0.2
        await eventually(lambda: asyncio.get_running_loop().time() > over)
        model.step_gate.let(1)
        await model.freed_of("g")
        assert len(model.steps) == 1


async def test_what_a_broker_does_not_take_is_bounded_and_one_that_hangs_holds_up_nobody_else(broker: Mosquitto) -> None:
    async with serving(broker, mqtt_interval=0) as (server, model, _), device(broker) as client:
        # More than the sockets' buffers and the outbox hold together.
        await client.send(type="generate", id="g", prompt=WIDE, ignore_eos=True, max_tokens=20_000)
        await client.until("started")
        broker.freeze()
        model.open()
        await model.freed_of("g")
        assert len(model.steps_of("g")) < 20_000
        async with server.client() as beside:
            assert (await beside.generate(id="g", prompt="hello"))["joined"] == "hello"
        broker.thaw()
        message = await client.done_at_last()
        assert message["finish_reason"] == "cancelled"


async def test_a_bug_in_a_message_handler_is_logged_and_the_next_message_served(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(message: Status, peer: Peer, models: ModelService) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(handlers.HANDLERS, Status, broken)
    async with serving(broker) as (_, model, face), device(broker) as client:
        model.open()
        await client.publish(f"{ROOT}/request", b'{"type":"status"}')
        await eventually(lambda: "a bug" in caplog.text)
        await face.listening.wait()
        assert (await client.generate(id="g", prompt="hello"))["text"] == "hello"


async def test_a_broker_that_lets_the_server_hear_nothing_is_tried_again(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = [ReasonCode(PacketTypes.SUBACK, "Not authorized")] * 2

    async def subscribe(*arguments: object) -> list[ReasonCode]:
        return refused

    with monkeypatch.context() as patched:
        patched.setattr(Broker, "subscribe", subscribe)
        async with serving(broker, connected=False) as (_, _, face):
            await eventually(
                lambda: "lets nobody of this name subscribe to llm/test/request/#: Not authorized" in caplog.text
            )
            assert not face.listening.is_set()
            patched.undo()
            await face.listening.wait()


class Lines:
    """Stands for a reply with many frames to say, and for a broker that is lost after it took the first of them."""

    def __init__(self, count: int) -> None:
        self.left = [Outgoing("topic", str(number).encode()) for number in range(count)]
        self.posted: list[Outgoing] = []
        self.lost = False

    def take(self) -> Outgoing | None:
        return self.left.pop(0) if self.left else None

    def post(self, message: Outgoing) -> None:
        self.posted.append(message)

    async def written(self) -> None:
        if not self.lost:
            self.lost = True
            raise BrokerLost("gone")


async def test_what_waited_for_a_lost_broker_is_told_to_the_next_one_though_nothing_new_is_said(broker: Mosquitto) -> None:
    await broker.stop()
    async with serving(broker, connected=False) as (_, _, face):
        lines = Lines(3 * BATCH)
        face._has_news(cast(Reply, lines))
        with pytest.raises(BrokerLost):
            await face._write(cast(Broker, lines))
        assert len(lines.posted) == BATCH
        writing = asyncio.create_task(face._write(cast(Broker, lines)))
        await eventually(lambda: len(lines.posted) == 3 * BATCH)
        writing.cancel()
