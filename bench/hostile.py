"""Clients that mean harm: `python -m bench.hostile HOST:PORT SECONDS [ATTACK...]`, all attacks if none is named.

Each attack comes from addresses of its own. They speak over bare sockets, because a library keeps the rules. What came of
them is printed in the end, as JSON.
"""

import asyncio
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from itertools import count

from websockets.frames import Frame, Opcode

from bench.sides.process import SideFailed, may_open
from bench.sides.websocket import HANDSHAKE

AT_ONCE = 5  # connections of a flood
HALF_OPEN = 2000  # sockets, of twenty addresses
PER_ADDRESS = 100
IDS = 10_000
# Seconds until an attacker who was turned away comes again. Who knocks does not wait at all.
PATIENCE = 0.1


class Attacker:
    """Somebody with one address."""

    def __init__(self, server: str, address: str, counts: Counter[str]) -> None:
        self.server = server
        self.counts = counts
        self.address = address

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection, and say nothing."""
        host, _, port = self.server.partition(":")
        found = await asyncio.open_connection(host, int(port), local_addr=(self.address, 0))
        self.counts["connections"] += 1
        return found

    async def enter(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a WebSocket.

        Raises:
            SideFailed: it was refused.
        """
        reader, writer = await self.connect()
        writer.write(HANDSHAKE.format(self.server).encode())
        if b" 101 " not in await reader.readuntil(b"\r\n\r\n"):
            writer.close()
            raise SideFailed("refused")
        self.counts["handshakes"] += 1
        return reader, writer

    async def repeat(self, attempt: "Attempt") -> None:
        """Try the same again and again."""
        while True:
            try:
                await attempt(self)
            except SideFailed:
                self.counts["refused"] += 1
                await asyncio.sleep(PATIENCE)
            except (OSError, EOFError):
                self.counts["cut off"] += 1


Attempt = Callable[[Attacker], Awaitable[None]]


def frame(opcode: Opcode, data: bytes, fin: bool = True) -> bytes:
    """Give a client's frame as it goes over the wire."""
    return Frame(opcode, data, fin=fin).serialize(mask=True)


def text(**message: object) -> bytes:
    """Give a message as it goes over the wire."""
    return frame(Opcode.TEXT, json.dumps(message).encode())


async def flood(attacker: Attacker, wire: bytes, messages: int) -> None:
    """Send the same over and over, and read nothing, until one is cut off."""
    _, writer = await attacker.enter()
    try:
        while True:
            writer.write(wire)
            attacker.counts["messages"] += messages
            await writer.drain()
    finally:
        writer.transport.abort()


async def half_open(attacker: Attacker) -> None:
    """Connect, and wait to be cut off."""
    reader, writer = await attacker.connect()
    try:
        await reader.read()
    finally:
        writer.transport.abort()
    raise SideFailed("waited for nothing")


async def slow_handshake(attacker: Attacker) -> None:
    """Say what there is to be said byte by byte."""
    _, writer = await attacker.connect()
    try:
        for byte in HANDSHAKE.format(attacker.server).encode():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(PATIENCE)
    finally:
        writer.transport.abort()


async def knock(attacker: Attacker) -> None:
    """Connect and go."""
    _, writer = await attacker.connect()
    writer.transport.abort()


async def bombs(attacker: Attacker) -> None:
    """Send what grows: a message of many pieces, nested ones, and one that says that it is compressed."""
    pieces = frame(Opcode.TEXT, b'{"type":"generate","prompt":"', fin=False) + 32 * frame(
        Opcode.CONT, b"x" * 16384, fin=False
    )
    nested = 8 * frame(Opcode.TEXT, b"[" * 250_000)
    branching = 8 * frame(Opcode.TEXT, b'{"x":[' + b",".join([b"[[[[]]]]"] * 20_000) + b"]}")
    plain = frame(Opcode.TEXT, zlib.compress(b"x" * 10_000_000))
    compressed = bytes([plain[0] | 0b100_0000]) + plain[1:]
    for bomb in (pieces, nested, branching, compressed):
        reader, writer = await attacker.enter()
        writer.write(bomb)
        attacker.counts["bombs"] += 1
        try:
            await reader.read()
        finally:
            writer.transport.abort()


async def ids(attacker: Attacker) -> None:
    """Ask for ten thousand generations, and read nothing."""
    _, writer = await attacker.enter()
    try:
        for number in count():
            writer.write(text(type="generate", id=str(number % IDS), prompt="p" * 100, ignore_eos=True, max_tokens=1000))
            attacker.counts["messages"] += 1
            await writer.drain()
    finally:
        writer.transport.abort()


# What each one does, and from how many addresses by how many connections at once.
Attacks = Mapping[str, tuple[Attempt, int, int]]
ATTACKS: Attacks = {
    "slow handshakes": (slow_handshake, 1, PER_ADDRESS // 2),
    "half-open sockets": (half_open, HALF_OPEN // PER_ADDRESS, PER_ADDRESS),
    "knocks": (knock, 1, 1),
    "pings": (lambda attacker: flood(attacker, 500 * frame(Opcode.PING, b"x" * 125), 500), 1, AT_ONCE),
    "bombs": (bombs, 1, AT_ONCE),
    "ids": (ids, 1, AT_ONCE),
    "foreign cancels": (lambda attacker: flood(attacker, 100 * text(type="cancel", id="g"), 100), 1, AT_ONCE),
    "tiny messages": (lambda attacker: flood(attacker, 1000 * frame(Opcode.TEXT, b"{}"), 1000), 1, AT_ONCE),
}


async def attack(server: str, seconds: float, attacks: Attacks) -> dict[str, Counter[str]]:
    """Let attacks go on for a time, in which each has begun; give what came of each."""
    found: dict[str, Counter[str]] = {name: Counter() for name in attacks}
    addresses, tasks = count(2), []
    for name, (attempt, many, at_once) in attacks.items():
        for _ in range(many):
            attacker = Attacker(server, f"127.0.1.{next(addresses)}", found[name])
            tasks += [asyncio.create_task(attacker.repeat(attempt)) for _ in range(at_once)]
    await asyncio.sleep(seconds)
    while not all(found.values()):  # noqa: ASYNC110 - the attackers are many, and count without an event
        await asyncio.sleep(PATIENCE)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    if wrong := [end for end in ends if isinstance(end, Exception)]:
        raise ExceptionGroup("an attacker failed", wrong)
    return found


def main(server: str, seconds: str, *names: str, known: Attacks = ATTACKS) -> None:
    """Run the command line: some of the `known` attacks, or all of them."""
    if not may_open(HALF_OPEN):
        sys.exit(f"not allowed to open {HALF_OPEN} files")
    os.nice(19)  # it stands for other machines, which take none of this one's time
    print("attacking", flush=True)
    attacks = {name: known[name] for name in names or known}
    print(json.dumps(asyncio.run(attack(server, float(seconds), attacks))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
