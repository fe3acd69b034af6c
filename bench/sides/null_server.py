"""Servers that do nothing but send: the least that a token frame can cost, and how fast the bench's own clients can read.

`python -m bench.sides.null_server websocket|http`. A request gets `max_tokens` ready-made frames, as fast as the library
takes them, and its end.
"""

import asyncio
import json
import sys

import uvloop
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed

TOKEN = b'{"type":"token","id":"g","seq":1234,"n":1,"text":" word"}'
EVENT = {"id": "g", "object": "text_completion", "created": 1234567890, "model": "null", "choices": [{"index": 0}]}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def answer_websocket(client: ServerConnection) -> None:
    """Answer one connection's requests, one after the other."""
    try:
        async for message in client:
            tokens = json.loads(message)["max_tokens"]
            for _ in range(tokens):
                await client.send(TOKEN, text=True)
                # A token is there before the next one: without this, uvloop would write hundreds of frames at once.
                await asyncio.sleep(0)
            usage = {"prompt_tokens": 0, "completion_tokens": tokens, "cached_tokens": 0}
            await client.send(json.dumps({"type": "done", "id": "g", "finish_reason": "length", "usage": usage}))
    except ConnectionClosed:
        return  # the client has what it wanted


async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    tokens = json.loads(await reader.readexactly(length))["max_tokens"]
    writer.write(HEAD)
    token = _chunk(EVENT | {"choices": [{"index": 0, "text": " word"}]})
    for _ in range(tokens):
        writer.write(token)
        await writer.drain()
    writer.write(_chunk(EVENT | {"usage": {"prompt_tokens": 0, "completion_tokens": tokens}}) + b"0\r\n\r\n")
    writer.close()


def _chunk(event: dict[str, object]) -> bytes:
    data = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


async def main(kind: str) -> None:
    """Serve until it is ended."""
    if kind == "websocket":
        async with serve_websocket(answer_websocket, "127.0.0.1", 0, compression=None) as websockets:
            print(f"serving at ws://127.0.0.1:{next(iter(websockets.sockets)).getsockname()[1]}/ws", flush=True)
            await websockets.serve_forever()
    async with await asyncio.start_server(answer_http, "127.0.0.1", 0) as http:
        print(f"running on http://127.0.0.1:{http.sockets[0].getsockname()[1]}", flush=True)
        await http.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))
