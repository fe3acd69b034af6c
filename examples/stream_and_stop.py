"""Stream an answer, whatever happens to the connection, and stop it. Needs a running server."""

import asyncio
import sys

from wsserver.client import connect


async def main(url: str = "ws://127.0.0.1:41443/ws") -> None:
    async with connect(url) as server:
        answer = server.generate(prompt="Once upon a time", max_tokens=500)
        async for token in answer:
            print(token, end="", flush=True)
            if answer.tokens > 20:
                answer.cancel()
        print(f"\n[{answer.done.finish_reason} after {answer.done.usage.completion_tokens} tokens]")


asyncio.run(main(*sys.argv[1:]))
