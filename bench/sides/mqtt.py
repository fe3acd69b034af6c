"""`wsserver` with the echo model on a clock, over a WebSocket and over a Mosquitto. The client knows docs/mqtt.md."""

import asyncio
import os
import secrets
import shutil
import socket
import time
from typing import Any

import aiomqtt
import orjson

from bench.load import Request
from bench.measure import Trace
from bench.sides.process import CACHE, SideFailed
from bench.sides.side import Setting
from bench.sides.websocket import WebSocketSide, wsserver_options

ROOT = "llm/bench"
BROKER = "listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nlog_dest stderr\n"
NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


class MqttClient:
    """Streams requests over a broker, all on one connection."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self._client = client
        self._reader = asyncio.create_task(self._read())
        self._answers: dict[str, asyncio.Queue[tuple[float, dict[str, Any]]]] = {}
        self._name = secrets.token_hex(4)
        self._asked = 0

    @classmethod
    async def connect(cls, port: int) -> "MqttClient":
        """Connect to a broker on this machine."""
        protocol = aiomqtt.ProtocolVersion.V5
        client = aiomqtt.Client("127.0.0.1", port, protocol=protocol, socket_options=[NODELAY])
        client.pending_calls_threshold = 1000  # it would warn of those that wait for an acknowledgement at once
        await client.__aenter__()
        self = cls(client)
        await client.subscribe(f"{ROOT}/reply/{self._name}/#", qos=1)
        return self

    async def stream(self, request: Request) -> Trace:
        """Run one request over the broker.

        Raises:
            SideFailed: it ended otherwise than asked, or a token was lost.
        """
        self._asked += 1
        reply = f"{ROOT}/reply/{self._name}/{self._asked}"
        frames = self._answers[reply] = asyncio.Queue()
        fields = {"prompt": request.prompt, "temperature": 0, "ignore_eos": True, "max_tokens": request.max_tokens}
        message = {"type": "generate", "id": "g", "reply_to": reply, **fields, **request.fields}
        sent, arrivals, seq = time.monotonic(), [], 0
        await self._client.publish(f"{ROOT}/request", orjson.dumps(message), qos=1)
        while (arrived := await frames.get())[1]["type"] != "done":
            now, frame = arrived
            if frame["type"] == "token":
                if frame["seq"] != seq:
                    raise SideFailed(f"tokens were lost between {seq} and {frame['seq']}")
                seq += frame["n"]
                arrivals.append(now)
        del self._answers[reply]
        now, done = arrived
        if done["finish_reason"] not in ("length", "stop") or done["usage"]["completion_tokens"] < seq:
            raise SideFailed(f"{done['finish_reason']}: {done.get('error')}")
        usage = done["usage"]
        counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"])
        return Trace(sent, tuple(arrivals), now, *counts)

    async def close(self) -> None:
        """Hang up."""
        self._reader.cancel()
        await self._client.__aexit__(None, None, None)

    async def _read(self) -> None:
        async for message in self._client.messages:
            assert isinstance(message.payload, bytes)
            if (frames := self._answers.get(str(message.topic))) is not None:
                frames.put_nowait((time.monotonic(), orjson.loads(message.payload)))


class MqttSide(WebSocketSide):
    """A paced echo on both; `stream` is over a WebSocket, `stream_mqtt` over the broker."""

    needs = ("aiomqtt",)

    def __init__(self, setting: Setting, milliseconds: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = [*wsserver_options(setting), f"--mqtt-url=mqtt://127.0.0.1:{self.port}", f"--mqtt-root={ROOT}"]
        super().__init__("wsserver, paced echo, MQTT", setting, "bench.sides.paced_echo", str(milliseconds), *options)
        self._broker: asyncio.subprocess.Process
        self._client: MqttClient

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        return super().missing or (None if shutil.which("mosquitto", path=PLACES) else "not installed: mosquitto")

    async def start(self) -> None:
        """Start the broker and the server, and connect; see `Side.start`."""
        CACHE.mkdir(exist_ok=True)
        config = CACHE / "mosquitto.conf"
        config.write_text(BROKER.format(port=self.port))
        command = shutil.which("mosquitto", path=PLACES)
        assert command, "else it is missing"
        self._broker = await asyncio.create_subprocess_exec(command, "-c", str(config), stderr=asyncio.subprocess.PIPE)
        assert self._broker.stderr
        while b" running" not in (line := await self._broker.stderr.readline()):
            if not line:
                raise SideFailed("mosquitto did not start")
        await super().start()
        self._client = await MqttClient.connect(self.port)

    async def stream_mqtt(self, request: Request) -> Trace:
        """Run one request over the broker."""
        return await self._client.stream(request)

    async def stop(self) -> None:
        """Hang up, and end the server and the broker."""
        await self._client.close()
        await super().stop()
        self._broker.terminate()
        await self._broker.wait()
