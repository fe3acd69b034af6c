"""Streams that run beside those that are measured, in a process of their own, so that reading them delays no reading there.

`python -m bench.sides.beside mqtt PORT STREAMS TOKENS`, or `websocket URL STREAMS TOKENS`. In the end it says how
many tokens it got.
"""

import asyncio
import sys

import uvloop

from bench.load import closed_loop, requests
from bench.measure import Trace
from bench.sides.mqtt import MqttClient
from bench.sides.websocket import Client


async def main(how: str, where: str, streams: str, tokens: str) -> None:
    """Stream, once each."""
    asked = requests(int(streams), [int(tokens)], lengths=(16,), seed=1)
    traces: list[Trace] = []
    if how == "mqtt":
        broker = await MqttClient.connect(int(where))
        traces = await closed_loop(broker.stream, len(asked), asked)
        await broker.close()
    else:
        clients = [await Client.connect(where) for _ in asked]
        traces = await asyncio.gather(*(client.stream(request) for client, request in zip(clients, asked, strict=True)))
    print(f"got {sum(trace.completion_tokens for trace in traces)} tokens")


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
