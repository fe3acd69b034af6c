"""A real Mosquitto on a free port, and a client of it that judges the frames it gets as the WebSocket's client does."""

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiomqtt
import orjson
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from handlers import dispatcher
from handlers.status import overview
from tests.checker import Checker
from tests.conftest import PATIENCE, Asker, Running, eventually
from tests.scripted import ScriptedModel, scripted
from wsserver.auth import Keys
from wsserver_mqtt.address import address
from wsserver_mqtt.face import Face
from wsserver_mqtt.topics import Topics

# Debian puts it where only root looks.
MOSQUITTO = shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto")

ROOT = "llm/test"
OPEN = ["allow_anonymous true", "set_tcp_nodelay true"]


def free_port() -> int:
    """Give a port that is free now, below those that the system gives to connections, so that it stays so."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Mosquitto:
    """A broker that can be killed and started again on its port."""

    def __init__(self, folder: Path, lines: list[str]) -> None:
        self.port = free_port()
        self._folder = folder
        self._lines = [f"listener {self.port} 127.0.0.1", "user root", "log_dest stderr", *lines]
        self._process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self._folder / "mosquitto.log").read_text()

    async def start(self) -> None:
        config = self._folder / "mosquitto.conf"
        config.write_text("\n".join(self._lines) + "\n")
        assert MOSQUITTO
        with (self._folder / "mosquitto.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(MOSQUITTO, "-c", str(config), stderr=log)
        await eventually(lambda: " running" in self.log or self._process.returncode is not None)
        assert self._process.returncode is None, self.log

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def mosquitto(folder: Path, lines: list[str] = OPEN) -> AsyncIterator[Mosquitto]:
    broker = Mosquitto(folder, lines)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    async with mosquitto(tmp_path) as broker:
        yield broker


class Device(Asker):
    """A client on the broker, whose answers go to one topic; every frame passes the checker."""

    def __init__(self, client: aiomqtt.Client, reply: str, modern: bool) -> None:
        self.client = client
        self.reply = reply
        super().__init__(Checker())
        self.messages: list[aiomqtt.Message] = []
        self._modern = modern

    async def send(self, correlation: bytes | None = None, expires_in: int | None = None, **message: Any) -> None:
        """Publish one message, given as its fields, at the topic for requests, or for cancels if it is one."""
        self.checker.sent(message)
        topic = f"{ROOT}/{'cancel' if message.get('type') == 'cancel' else 'request'}"
        await self.publish(topic, orjson.dumps(self.addressed(message)), correlation, expires_in)

    def addressed(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give a message as it is sent: MQTT 3.1.1 has no other place for the topic of the answer."""
        return message if self._modern else message | {"reply_to": self.reply}

    async def publish(
        self,
        topic: str,
        payload: bytes,
        correlation: bytes | None = None,
        expires_in: int | None = None,
        token: str | None = None,
    ) -> None:
        """Publish anything."""
        properties = None
        if self._modern:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = self.reply
            if correlation is not None:
                properties.CorrelationData = correlation
            if expires_in is not None:
                properties.MessageExpiryInterval = expires_in
            if token is not None:
                properties.UserProperty = ("token", token)
        await self.client.publish(topic, payload, qos=1, properties=properties)

    async def receive(self) -> dict[str, Any]:
        """Give the next frame of any kind."""
        frame = await self.receive_unjudged()
        self._judge(dict(frame))
        return frame

    async def receive_unjudged(self) -> dict[str, Any]:
        """Give the next frame, where some may have been lost."""
        async with asyncio.timeout(PATIENCE):
            message = await anext(aiter(self.client.messages))
        assert isinstance(message.payload, bytes)
        frame: dict[str, Any] = orjson.loads(message.payload)
        self.frames.append(frame)
        self.messages.append(message)
        return frame

    async def done_at_last(self) -> dict[str, Any]:
        """Read on until a `done`, where frames before it may have been lost."""
        while (frame := await self.receive_unjudged())["type"] != "done":
            pass
        return frame

    def _judge(self, frame: dict[str, Any]) -> None:
        """Let the checker see a frame; that a streamed answer's done has the whole text is MQTT's own."""
        asked = self.checker.open.get(frame.get("id", ""))
        if frame["type"] == "done" and asked and asked[0].message.get("stream") is not False:
            text = frame.pop("text", "")
            assert text.startswith(asked[0].text), f"another text than in the tokens: {frame}"
            assert text == asked[0].text or frame["finish_reason"] == "cancelled", f"not the tokens' text: {frame}"
        self.checker.received(orjson.dumps(frame).decode())


@contextlib.asynccontextmanager
async def device(
    broker: Mosquitto, name: str = "me", modern: bool = True, reply: str | None = None, **options: Any
) -> AsyncIterator[Device]:
    """Connect a client, and let it listen to its topic below the server's replies."""
    protocol = aiomqtt.ProtocolVersion.V5 if modern else aiomqtt.ProtocolVersion.V311
    reply = reply or f"{ROOT}/reply/{name}"
    async with aiomqtt.Client("127.0.0.1", broker.port, protocol=protocol, **options) as client:
        await client.subscribe(reply, qos=1)
        yield Device(client, reply, modern)


@contextlib.asynccontextmanager
async def serving(
    broker: Mosquitto,
    keys: Keys | None = None,
    topics: Topics | None = None,
    connected: bool = True,
    **settings: Any,
) -> AsyncIterator[tuple[Running, ScriptedModel, Face]]:
    """Serve a scripted model on a broker, and over WebSockets as ever."""
    async with scripted(keys=keys, **settings) as (server, model):
        at = address(broker.url, None)
        topics = topics or Topics(ROOT)
        keys, dispatch = keys or Keys({}), dispatcher(server.models)
        told = partial(overview, server.server.state, server.models)
        face = Face(at, topics, server.server, keys, dispatch, told, waits=lambda: itertools.repeat(0.01))
        server.models.on_event = face.tell
        async with face:
            if connected:
                await face.listening.wait()
            yield server, model, face
