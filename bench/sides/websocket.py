"""What speaks our wire: `wsserver` itself, and stand-ins for it. The client is the bench's own; it knows protocol.md."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from websockets.asyncio.client import ClientConnection, connect

from bench.load import Request
from bench.measure import Trace
from bench.sides.process import Process, SideFailed
from bench.sides.side import Setting, Side

# What opens a WebSocket, said to a host and port.
HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Client:
    """One connection, with one generation at a time."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    @classmethod
    async def connect(cls, url: str) -> "Client":
        """Connect to a server."""
        return cls(await connect(url, compression=None, max_size=None, ping_interval=None))

    async def send(self, **message: Any) -> float:
        """Send one message; give the time at which it was sent."""
        sent = time.monotonic()
        await self.socket.send(orjson.dumps(message), text=True)
        return sent

    async def frames(self) -> AsyncIterator[tuple[float, dict[str, Any]]]:
        """Give the frames, each with the time of its arrival, up to the next `done`."""
        while True:
            data = await self.socket.recv(decode=False)
            now, frame = time.monotonic(), orjson.loads(data)
            yield now, frame
            if frame["type"] == "done":
                return

    async def generate(self, request: Request) -> float:
        """Ask for an answer; give the time at which that was sent."""
        fields = {"prompt": request.prompt, "temperature": 0, "ignore_eos": True, "max_tokens": request.max_tokens}
        return await self.send(type="generate", id="g", **(fields | request.fields))

    async def answer(self, sent: float) -> tuple[Trace, dict[str, Any]]:
        """Read the answer to its end; give it as it was seen, and its `done`."""
        arrivals = []
        async for now, frame in self.frames():
            if frame["type"] == "token":
                arrivals.append(now)
            elif frame["type"] == "error":
                raise SideFailed(f"{frame['code']}: {frame['message']}")
        usage = frame["usage"]
        counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"])
        return Trace(sent, tuple(arrivals), now, *counts), frame

    async def stream(self, request: Request) -> Trace:
        """Run one request to its end."""
        trace, done = await self.answer(await self.generate(request))
        if done["finish_reason"] not in ("length", "stop"):
            raise SideFailed(f"{done['finish_reason']}: {done.get('error', {}).get('message', 'no reason given')}")
        return trace


class WebSocketSide(Side):
    """A Python module that serves our protocol and prints at which URL."""

    def __init__(self, name: str, setting: Setting, module: str, *arguments: str) -> None:
        super().__init__(name, setting)
        self._command = (module, *arguments)
        self._idle: list[Client] = []
        self.url = ""

    async def start(self) -> None:
        """Start it; see `Side.start`."""
        self.process = await Process.spawn(self.name, *self._command, threads=self.setting.threads)
        self.url = (await self.process.wait_for(r"\bat (ws://\S+)"))[1]

    async def stream(self, request: Request) -> Trace:
        """Run one request on a connection of its own, as many as run at once; see `Side.stream`."""
        client = self._idle.pop() if self._idle else await Client.connect(self.url)
        trace = await client.stream(request)
        self._idle.append(client)
        return trace

    async def stop(self) -> None:
        """Hang up, and end it."""
        for client in self._idle:
            await client.socket.close()
        await super().stop()


# All the load comes from one address.
ONE_CLIENT_MAY = {
    "max-connections": "100000",
    "max-connections-per-address": "100000",
    "handshakes-per-second": "100000",
    "messages-per-second": "100000",
    "max-requests-per-key": "100000",
    "max-queued-per-key": "100000",
    "tokens-per-minute": "1000000000",
}


def wsserver(
    setting: Setting,
    module: str = "wsserver",
    *before: str,
    name: str = "wsserver",
    limits: Mapping[str, str] = ONE_CLIENT_MAY,
) -> WebSocketSide:
    """Give our server, as its users start it but for its limits on one client."""
    return WebSocketSide(name, setting, module, *before, *wsserver_options(setting, limits))


def wsserver_options(setting: Setting, limits: Mapping[str, str] = ONE_CLIENT_MAY) -> list[str]:
    """Give the options that our server is started with."""
    options = {
        "port": "0",
        "model": setting.model,
        "dtype": setting.dtype,
        "device": setting.device,
        "max-active": str(setting.streams),
        "threads": str(setting.threads),
        "decode": setting.decode,
        "log-level": "warning",
        **limits,
    }
    return [f"--{key}={value}" for key, value in options.items()]
