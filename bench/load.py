"""What clients ask, and when: prompts, and the two ways in which requests arrive. Knows no side but by its `stream`."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.measure import Trace

TEXT = """
the a river old light walks over under stone between quiet houses and morning people carry bread water paper small questions
about how long why when numbers letters grow fall turn green blue winter road market song ship engine window table glass
garden mountain letter friend answer story begins with of in to from that this which
"""
LENGTHS = (12, 96, 24, 160, 48, 8, 64, 32)  # words of a prompt, in turn


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued by exactly `max_tokens` tokens, greedily unless `fields` say otherwise.

    `fields` are the wire's own, and only our server knows them.
    """

    prompt: str
    max_tokens: int
    fields: dict[str, Any] = field(default_factory=dict)


Stream = Callable[[Request], Awaitable[Trace]]


def prompts(
    count: int, lengths: Sequence[int] = LENGTHS, seed: int = 0, words: Sequence[str] = tuple(TEXT.split())
) -> list[str]:
    """Make texts of mixed length, the same ones for the same arguments; no two begin alike, so no cache helps anybody."""
    draw = random.Random(seed)
    return [f"{draw.randrange(10**6)} {' '.join(draw.choices(words, k=lengths[i % len(lengths)]))}" for i in range(count)]


def requests(count: int, max_tokens: Sequence[int], seed: int = 0, **details: Any) -> list[Request]:
    """Make requests of mixed lengths, in and out."""
    return [Request(p, max_tokens[i % len(max_tokens)]) for i, p in enumerate(prompts(count, seed=seed, **details))]


async def one_after_the_other(
    stream: Stream, requests: Iterable[Request], think: float, goes_on: Callable[[], bool] = lambda: True
) -> list[Trace]:
    """Let one client ask as a person does, who needs `think` seconds before the next question."""
    traces = []
    for request in requests:
        traces.append(await stream(request))
        await asyncio.sleep(think)
        if not goes_on():
            break
    return traces


async def closed_loop(stream: Stream, clients: int, requests: Sequence[Request]) -> list[Trace]:
    """Let `clients` clients take the next request each, as soon as their last one has ended."""
    waiting = iter(requests)
    traces: list[Trace] = []

    async def client() -> None:
        for request in waiting:
            traces.append(await stream(request))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return traces


async def poisson(stream: Stream, per_second: float, requests: Sequence[Request], seed: int = 0) -> list[Trace]:
    """Send the requests at random times, `per_second` on average, whether earlier ones have ended or not."""
    draw = random.Random(seed)
    tasks = []
    async with asyncio.TaskGroup() as group:
        for request in requests:
            tasks.append(group.create_task(_awaited(stream, request)))
            await asyncio.sleep(draw.expovariate(per_second))
    return [task.result() for task in tasks]


async def _awaited(stream: Stream, request: Request) -> Trace:
    return await stream(request)
