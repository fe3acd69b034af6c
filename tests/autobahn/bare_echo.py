"""The yardstick: an echo server of the library alone, with the options that our server gives it. Run as a process."""

import asyncio
import contextlib

import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from wsserver.accepted import UNREAD_MESSAGES, WRITE_LIMIT
from wsserver.protocol import MAX_MESSAGE_BYTES


async def echo(client: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in client:
            await client.send(message)


async def main() -> None:
    options = {"compression": None, "max_size": MAX_MESSAGE_BYTES, "max_queue": UNREAD_MESSAGES, "write_limit": WRITE_LIMIT}
    async with serve(echo, "127.0.0.1", 0, **options) as server:
        print(f"serving at ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
