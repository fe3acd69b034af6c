"""Stream an answer, whatever happens to the connection, and stop it. Needs a running server and `pip install websockets`."""

import asyncio
import json
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed


async def main(url: str = "ws://127.0.0.1:41443/ws") -> None:
    ask = {"type": "generate", "id": "g1", "prompt": "Once upon a time", "max_tokens": 500, "resumable": True}
    async for server in connect(url):  # and again, after a growing delay, when the connection is lost
        try:
            await server.send(json.dumps(ask))
            async for data in server:
                frame = json.loads(data)
                if frame["type"] == "started":
                    ask = {"type": "resume", "id": "g1", "resume_token": frame["resume_token"], "after_seq": 0}
                elif frame["type"] == "token":
                    print(frame["text"], end="", flush=True)
                    ask["after_seq"] = frame["seq"] + frame["n"]
                    if frame["seq"] >= 20:
                        await server.send(json.dumps({"type": "cancel", "id": "g1"}))
                elif frame["type"] == "done":
                    print(f"\n[{frame['finish_reason']} after {frame['usage']['completion_tokens']} tokens]")
                    return
                elif frame["type"] == "error" and frame["code"] != "not_active":
                    sys.exit(f"\n{frame['message']}")
        except ConnectionClosed:
            continue


asyncio.run(main(*sys.argv[1:]))
