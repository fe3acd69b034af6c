"""Runs sides alternately, A B B A, each time in a fresh process, and keeps what was measured or why it was not."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from websockets.exceptions import ConnectionClosed

from bench.load import Request, closed_loop, prompts
from bench.measure import Trace
from bench.sides.process import SideFailed
from bench.sides.side import Setting, Side, running
from bench.table import Row

T = TypeVar("T")
TIME_LIMIT = 1800.0  # seconds for one side's one measurement
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure."""

    model: str
    threads: int
    rounds: int
    quick: bool
    bandwidth: float  # bytes per second that this machine reads
    dtype: str = "float32"  # of rows that do not name one
    device: str = "cpu"
    decode: str = "eager"

    def pick(self, full: T, quick: T) -> T:
        """Give the first, or in a quick run the second."""
        return quick if self.quick else full

    def setting(self, streams: int = 1, dtype: str | None = None, model: str | None = None) -> Setting:
        """Say how a side is to be started."""
        return Setting(model or self.model, dtype or self.dtype, self.device, self.threads, streams, self.decode)


# What fills some rows of the table.
Measurement = Callable[[Plan], Awaitable[list[Row]]]


@dataclass(frozen=True, slots=True)
class Variant(Generic[T]):
    """One of the things compared: a side, and what is done with it."""

    side: Callable[[], Side]
    measure: Callable[[Side], Awaitable[T]]
    warm_up: int = 1  # requests at once, before anything is measured


@dataclass
class Runs(Generic[T]):
    """What each variant gave in each round, and why some gave nothing."""

    found: dict[str, list[T]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def each(self, name: str, value: Callable[[T], float]) -> list[float]:
        """Give one figure per round."""
        return [value(result) for result in self.found.get(name, [])]

    def why_not(self, *names: str) -> str:
        """Say which of some variants could not be measured, and why; empty if all could."""
        return "; ".join(f"{self.absent[name]}" for name in names if name in self.absent)


async def alternate(variants: Mapping[str, Variant[T]], rounds: int) -> Runs[T]:
    """Measure every variant once a round, every other round in the opposite order."""
    runs: Runs[T] = Runs()
    for number in range(rounds):
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            if name not in runs.absent:
                await _measure(runs, name, variants[name], f"{number + 1}/{rounds}")
    return runs


async def _measure(runs: Runs[T], name: str, variant: Variant[T], number: str) -> None:
    if missing := variant.side().missing:
        runs.absent[name] = missing
        return
    print(f"  {number} {name}", file=sys.stderr, flush=True)
    try:
        async with asyncio.timeout(TIME_LIMIT), running(variant.side) as side:
            await warm_up(side, variant.warm_up)
            result = await variant.measure(side)
    except* (SideFailed, ConnectionClosed, OSError, EOFError) as failures:
        runs.absent[name] = f"{name} failed: {_reason(failures)}"
        print(f"  {runs.absent[name]}", file=sys.stderr, flush=True)
    else:
        runs.found.setdefault(name, []).append(result)


def _reason(failures: BaseExceptionGroup) -> str:
    first = failures.exceptions[0]
    return _reason(first) if isinstance(first, BaseExceptionGroup) else str(first) or type(first).__name__


def closed(clients: int, asked: Sequence[Request]) -> Callable[[Side], Awaitable[list[Trace]]]:
    """Give a measurement: that many clients in a closed loop."""

    async def measure(side: Side) -> list[Trace]:
        return await closed_loop(side.stream, clients, asked)

    return measure


async def warm_up(side: Side, clients: int) -> None:
    """Let a side do once what it does only once."""
    asked = [Request(prompt, WARM_UP_TOKENS) for prompt in prompts(clients, lengths=(8,), seed=99)]
    await closed_loop(side.stream, clients, asked)
