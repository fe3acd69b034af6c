"""Stream an answer and stop it in the middle. Needs a running server and `pip install websockets`."""

import asyncio
import json
import sys

from websockets.asyncio.client import connect


async def main(url: str = "ws://127.0.0.1:41443/ws") -> None:
    async with connect(url) as server:
        await server.send(json.dumps({"type": "generate", "id": "g1", "prompt": "Once upon a time", "max_tokens": 500}))
        async for data in server:
            frame = json.loads(data)
            if frame["type"] == "token":
                print(frame["text"], end="", flush=True)
                if frame["seq"] >= 20:
                    await server.send(json.dumps({"type": "cancel", "id": "g1"}))
            elif frame["type"] == "done":
                print(f"\n[{frame['finish_reason']} after {frame['usage']['completion_tokens']} tokens]")
                return


asyncio.run(main(*sys.argv[1:]))
