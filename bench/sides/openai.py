"""What speaks OpenAI's completions over HTTP, server-sent events: `transformers serve`, and a stand-in for it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson

from bench.load import Request
from bench.measure import Trace
from bench.sides.process import Process, SideFailed
from bench.sides.side import Setting, Side


class OpenAISide(Side):
    """A Python module that serves `/v1/completions` and prints at which URL."""

    def __init__(self, name: str, setting: Setting, module: str, *arguments: str) -> None:
        super().__init__(name, setting)
        self._command = (module, *arguments)
        self._address = ("", 0)

    async def start(self) -> None:
        """Start it; see `Side.start`."""
        self.process = await Process.spawn(self.name, *self._command, threads=self.setting.threads)
        found = await self.process.wait_for(r"running on http://([^:]+):(\d+)")
        self._address = (found[1], int(found[2]))

    async def stream(self, request: Request) -> Trace:
        """Run one request on a connection of its own; see `Side.stream`."""
        reader, writer = await asyncio.open_connection(*self._address)
        arrivals: list[float] = []
        usage: dict[str, int] | None = None
        try:
            sent = time.monotonic()
            writer.write(_post("/v1/completions", self._body(request)))
            async for event in _events(reader):
                now = time.monotonic()
                if "error" in event:
                    raise SideFailed(f"{self.name}: {event['error']}")
                if event["choices"][0].get("text"):
                    arrivals.append(now)
                usage = event.get("usage") or usage
        finally:
            writer.close()
        if usage is None or usage["completion_tokens"] != request.max_tokens:
            raise SideFailed(f"{self.name}: wanted {request.max_tokens} tokens, got {usage}")
        return Trace(sent, tuple(arrivals), now, usage["prompt_tokens"], usage["completion_tokens"])

    def _body(self, request: Request) -> bytes:
        # No end token, so that every side does the same work; and not temperature 0, which ends continuous batching.
        generation = {"max_new_tokens": request.max_tokens, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
        body = {"model": str(self.setting.folder), "prompt": request.prompt, "stream": True}
        return orjson.dumps(body | {"max_tokens": request.max_tokens, "generation_config": json.dumps(generation)})


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Give the events of an answer in chunks; an HTTP client of general use would cost more than some of the servers.

    Raises:
        SideFailed: the answer is an error.
    """
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise SideFailed((head + await reader.read()).decode(errors="replace")[-200:])
    unread = b""
    while size := int(await reader.readline(), 16):
        unread += (await reader.readexactly(size + 2))[:-2]
        *events, unread = unread.split(b"\n\n")
        for event in events:
            if event != b"data: [DONE]":
                yield orjson.loads(event.removeprefix(b"data: "))


class TransformersServe(OpenAISide):
    """`transformers serve`, one request at a time or with continuous batching."""

    needs = ("fastapi", "uvicorn", "openai", "pydantic")


def transformers_serve(setting: Setting, continuous: bool) -> Side:
    """Give `transformers serve` as it ships, or with its switch for continuous batching."""
    name = "transformers serve, continuous" if continuous else "transformers serve"
    options = [f"--device={setting.device}", f"--dtype={setting.dtype}", "--host=127.0.0.1", "--port=0"]
    options += ["--continuous-batching"] if continuous else []
    return TransformersServe(name, setting, "transformers.cli.transformers", "serve", str(setting.folder), *options)
