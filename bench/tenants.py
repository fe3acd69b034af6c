"""Clients that keep every limit and want the whole server: `python -m bench.tenants HOST:PORT SECONDS [ATTACK...]`.

Each attack comes from an address of its own over `AT_ONCE` connections, each a valid client that reads
all it is sent. What came of them is printed at the end, as JSON.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import count, cycle, product, repeat
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from bench.hostile import Attacker, Attacks, main
from bench.sides.process import SideFailed

AT_ONCE = 50  # connections of one attack
# Messages a second on each connection: all of them together are ten, which is what one client may send by the limits that
# README recommends for many clients. Who sends more is cut off, and belongs to `bench.hostile`.
RATE = 10.0 / AT_ONCE
DIGITS = "1234567890" * 25_000
OTHER_MODEL = "google/gemma-3-270m"  # GGUF: its header is long to read
PRECISIONS = [
    {"dtype": dtype, "quantization": how} for dtype, how in product(("float32", "bfloat16"), ("none", "int8", "nf4", "fp4"))
]
BYTE_TOKEN = "100"  # half a character in most vocabularies: it never becomes text by itself


@asynccontextmanager
async def line(attacker: Attacker) -> AsyncIterator[ClientConnection]:
    """Open a connection from the attacker's address.

    Raises:
        SideFailed: the server refused it, or closed it later.
    """
    address = (attacker.address, 0)
    url = f"ws://{attacker.server}/ws"
    try:
        async with connect(url, local_addr=address, compression=None, max_size=None, ping_interval=None) as socket:
            attacker.counts["connections"] += 1
            yield socket
    except (ConnectionClosed, InvalidHandshake, TimeoutError) as error:
        raise SideFailed(str(error)) from error


async def read_all(socket: ClientConnection, attacker: Attacker) -> None:
    """Read every frame, and count the kinds of answers."""
    async for data in socket:
        frame = json.loads(data)
        kind = frame.get("code") or (frame.get("error") or {}).get("code") or frame["type"]
        attacker.counts[kind] += 1


async def send_all(socket: ClientConnection, attacker: Attacker, messages: Iterable[str], rate: float) -> None:
    """Send messages at a rate, and read what comes back, until the connection ends."""
    reading = asyncio.create_task(read_all(socket, attacker))
    try:
        for message in messages:
            await socket.send(message)
            attacker.counts["messages"] += 1
            await asyncio.sleep(1 / rate)  # the rate of the attack
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def say(attacker: Attacker, messages: Iterable[str], rate: float = RATE) -> None:
    """Open a connection for some messages."""
    async with line(attacker) as socket:
        await send_all(socket, attacker, messages, rate)


def refused_inits() -> Iterator[str]:
    """Ask again and again for a model that this server does not load."""
    for options in cycle(PRECISIONS):
        yield json.dumps({"type": "init", "model": OTHER_MODEL, **options})


def inits_and_cancels() -> Iterator[str]:
    """Begin loads of every precision, and give each of them up at once."""
    for number, options in enumerate(cycle(PRECISIONS)):
        yield json.dumps({"type": "init", "id": f"i{number}", **options})
        yield json.dumps({"type": "cancel", "id": f"i{number}"})


def every_precision() -> Iterator[str]:
    """Ask for the default model in every precision, and use each."""
    for options in cycle(PRECISIONS):
        yield json.dumps({"type": "init", **options})
        yield json.dumps({"type": "generate", "prompt": "The capital of France is", "max_tokens": 1})


def generations(**fields: Any) -> Iterator[str]:
    """Ask for the same again and again."""
    # Made once: making long messages on this machine would take time from the server, which other machines cannot.
    rest = json.dumps({"type": "generate", "ignore_eos": True, **fields})[1:]
    for number in count():
        yield f'{{"id": "g{number}", {rest}'


async def resumes(attacker: Attacker) -> None:
    """Make one answer with log probabilities, and have it replayed again and again."""
    async with line(attacker) as socket:
        token = None
        while token is None:
            token = await resumable(socket)
            await asyncio.sleep(1 / RATE)  # the rate of the attack
        resume = {"type": "resume", "id": "r", "resume_token": token, "after_seq": 0}
        await send_all(socket, attacker, repeat(json.dumps(resume)), RATE)


async def resumable(socket: ClientConnection) -> str | None:
    """Ask for a resumable answer and read it whole; return its token, None if it was refused."""
    ask = {"type": "generate", "id": "r", "prompt": "Once upon a time", "max_tokens": 400}
    await socket.send(json.dumps({**ask, "ignore_eos": True, "resumable": True, "logprobs": 20}))
    token: str | None = None
    async for data in socket:
        frame = json.loads(data)
        token = frame.get("resume_token", token)
        if frame["type"] in ("done", "error"):
            break
    return token


EMPTY_MESSAGES = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}] * 3500
LONG = {"prompt": "Once upon a time", "max_tokens": 7000}

ATTACKS: Attacks = {
    "refused inits": (lambda a: say(a, refused_inits()), 1, AT_ONCE),
    "inits and cancels": (lambda a: say(a, inits_and_cancels()), 1, AT_ONCE),
    "every precision": (lambda a: say(a, every_precision()), 1, AT_ONCE),
    "digits": (lambda a: say(a, generations(prompt=DIGITS)), 1, AT_ONCE),
    "empty messages": (lambda a: say(a, generations(messages=EMPTY_MESSAGES)), 1, AT_ONCE),
    "long answers": (lambda a: say(a, generations(**LONG)), 1, AT_ONCE),
    "resumes": (resumes, 1, AT_ONCE),
    "hidden tokens": (
        lambda a: say(a, generations(**LONG, logit_bias={BYTE_TOKEN: 100}, temperature=0)),
        1,
        AT_ONCE,
    ),
}


if __name__ == "__main__":
    partial(main, known=ATTACKS)(*sys.argv[1:])
