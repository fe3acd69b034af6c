"""Rows about our server's memory: what an idle connection takes, and what is left of minutes of coming and going."""

import asyncio
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

from bench.load import Request
from bench.runs import Measurement, Plan, Variant, alternate
from bench.sides import ECHO, SIDES, paced_echo
from bench.sides.process import SideFailed, may_open
from bench.sides.side import Side
from bench.sides.websocket import HANDSHAKE, Client, WebSocketSide
from bench.table import Row, single

IDLE = 2000  # connections
AT_ONCE = 50  # of them in their handshakes
SOAKERS = 200  # clients
SOAK_TICK = 50.0  # milliseconds of a step: 4000 tokens a second, of which a core is not half busy
WARM_UP = 0.1  # share of a soak
SAMPLES = 120  # of the memory in a soak
KIB, MIB = 1 << 10, 1 << 20


@dataclass
class Soak:
    """What happened in a soak."""

    start: int
    resident: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def warm(self) -> int:
        """What was resident after the warm-up."""
        return self.resident[round(WARM_UP * len(self.resident))]

    @property
    def growth(self) -> float:
        """How much more it was at the end, in MiB."""
        return (self.resident[-1] - self.warm) / MIB

    def line(self) -> str:
        """Give it in words."""
        places = {"at the start": self.start, "after the warm-up": self.warm, "at the end": self.resident[-1]}
        told = [f"{size / MIB:.1f} {place}" for place, size in {**places, "at most": max(self.resident)}.items()]
        return f"MiB: {', '.join(told)}; " + ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


async def idle_memory(plan: Plan) -> list[Row]:
    """Measure the resident memory of the server's process per connection that has shaken hands and says nothing."""
    count = plan.pick(IDLE, 200)
    if not may_open(count):
        return [Row("idle_memory", note=f"not allowed to open {count} files")]
    side = partial(SIDES["wsserver"], plan.setting(1, "auto", ECHO))
    runs = await alternate({"wsserver": Variant(side, partial(_kib_per_connection, count))}, plan.rounds)
    if not (found := runs.found.get("wsserver")):
        return [Row("idle_memory", note=runs.why_not("wsserver"))]
    return [single("idle_memory", found, note=f"{count} connections")]


async def soak(plan: Plan) -> list[Row]:
    """Let clients stream, cancel, hang up and come back for ten minutes, once; measure by how much the memory grows."""
    side = partial(paced_echo, plan.setting(SOAKERS, "auto", ECHO), SOAK_TICK)
    seconds = plan.pick(600.0, 10.0)
    runs = await alternate({"wsserver": Variant(side, partial(_soak, seconds), SOAKERS)}, 1)
    if not (found := runs.found.get("wsserver")):
        return [Row("soak", note=runs.why_not("wsserver"))]
    return [single("soak", [found[0].growth], note=f"{seconds:.0f} s, {found[0].line()}")]


async def _kib_per_connection(count: int, side: Side) -> float:
    assert isinstance(side, WebSocketSide)
    address = side.url.split("/")[2]
    before = side.process.resident()
    async with AsyncExitStack() as stack:
        for _ in range(0, count, AT_ONCE):
            writers = await asyncio.gather(*(_shake_hands(address) for _ in range(AT_ONCE)))
            for writer in writers:
                stack.callback(writer.close)
        return (side.process.resident() - before) / count / KIB


async def _shake_hands(address: str) -> asyncio.StreamWriter:
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(HANDSHAKE.format(address).encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 101 " not in answer:
        raise SideFailed(f"no handshake: {answer[:80]!r}")
    return writer


async def _soak(seconds: float, side: Side) -> Soak:
    assert isinstance(side, WebSocketSide)
    found = Soak(side.process.resident())
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for number in range(SOAKERS):
            group.create_task(_use(side.url, random.Random(number), until, found.counts))
        while time.monotonic() < until:
            await asyncio.sleep(seconds / SAMPLES)
            found.resident.append(side.process.resident())
    return found


async def _use(url: str, draw: random.Random, until: float, counts: Counter[str]) -> None:
    """Be one client: each connection serves some generations, the last of which may be left without a word."""
    while time.monotonic() < until:
        client = await Client.connect(url)
        counts["connections"] += 1
        for _ in range(draw.randint(1, 5)):
            if await _leaves(client, draw, counts):
                client.socket.transport.abort()
                break
        await client.socket.close()


async def _leaves(client: Client, draw: random.Random, counts: Counter[str]) -> bool:
    """Run one generation to its end, its cancel, or to where the client has had enough; say whether it had."""
    fate = draw.choices(("length", "cancelled", "left"), (6, 3, 1))[0]
    await client.generate(Request("drip, drop, ", draw.randint(20, 200)))
    patience = draw.randint(1, 20)  # frames
    async for _, frame in client.frames():
        patience -= frame["type"] == "token"
        if patience == 0 and fate == "cancelled":
            await client.send(type="cancel", id="g")
        if patience == 0 and fate == "left":
            counts["left"] += 1
            return True
    if frame["finish_reason"] not in ("length", fate):
        raise SideFailed(f"a soaking stream ended with {frame['finish_reason']}")
    counts[frame["finish_reason"]] += 1
    return False


ROWS: dict[str, Measurement] = {"idle_memory": idle_memory, "soak": soak}
