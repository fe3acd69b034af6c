"""Twenty minutes of loads, unloads, cancels and resumes of two models: memory stays what it was at minute five."""

import asyncio
import itertools
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from tests.asked import Resumable
from tests.conftest import DEFAULT_MODEL, Client, connect
from tests.test_main import COMMAND, Process, process
from tests.torture.test_torture import Held

OTHER_MODEL = "google/gemma-3-270m"
CLIENTS = 4
MINUTE = 60.0
BEFORE, WHOLE = 5 * MINUTE, 20 * MINUTE
GROWTH = 1.1
ROUNDS = 10  # of answers at rest, after each of which memory is read
KEEP_ALIVE = 2  # seconds, so that a model which no client uses is unloaded soon and loaded again
OPTIONS = {
    "keep-alive": KEEP_ALIVE,
    "loads-per-minute": 1000,
    "max-models-per-client": 8,
    "threads": 1,
}
PRECISIONS = ({}, {"dtype": "float32"}, {"quantization": "int8"})
PROMPTS = ("The capital of France is", "Once upon a time", "Seven ways to boil an egg:")


class Tenant:
    """A client that loads, asks, cancels, loses its connection and resumes, as drawn."""

    def __init__(self, server: Process, draw: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._server = server
        self._draw = draw
        self._ids = (f"g{number}" for number in itertools.count())

    async def act(self) -> None:
        """Do one thing, on a connection of its own."""
        act = self._draw.choice((self.load, self.answer, self.cancel, self.resume, self.hang_up))
        async with self._server.client() as client:
            await act(client)
        self.counts[act.__name__] += 1

    async def load(self, client: Client) -> None:
        """Choose a model in some precision, and ask it something."""
        model = self._draw.choice((DEFAULT_MODEL, OTHER_MODEL))
        await client.send(type="init", id="i", model=model, **self._draw.choice(PRECISIONS))
        frame = await client.until("ready", "error", id="i")
        self.counts[frame.get("code", "ready")] += 1
        if frame["type"] == "ready":
            await self.answer(client)

    async def answer(self, client: Client) -> None:
        """Read an answer whole."""
        done = await client.generate(**self._question())
        self.counts[done["finish_reason"]] += 1

    async def cancel(self, client: Client) -> None:
        """Cancel an answer after its first tokens."""
        question = self._question(max_tokens=200)
        await client.send(type="generate", **question)
        await client.until("token", "done", id=question["id"])
        if not client.of(question["id"], "done"):
            await client.send(type="cancel", id=question["id"])
        await client.done(question["id"])

    async def hang_up(self, client: Client) -> None:
        """Leave while an answer is made."""
        await client.send(type="generate", **self._question(max_tokens=200))
        await client.until("started", "done")

    async def resume(self, client: Client) -> None:
        """Lose the connection after the first tokens, and go on over another one."""
        known: Resumable = {}
        question = self._question(max_tokens=60, resumable=True, logprobs=5)
        async with connect(self._server.url, compression=None) as socket:
            before = Client(socket, known)
            await before.send(type="generate", **question)
            await before.until("token", id=question["id"])
        client.checker.resumable = known
        await client.resume(before, question["id"])
        done = await client.done(question["id"])
        assert done["usage"]["completion_tokens"] == 60, done

    def _question(self, **fields: object) -> dict[str, object]:
        asked = {"prompt": self._draw.choice(PROMPTS), "max_tokens": 24, "ignore_eos": True}
        return {"id": next(self._ids), **asked, **fields}


async def at_rest(server: Process) -> int:
    """Keep both models in use until every other one has left; give the memory held then, in bytes."""
    held, resident = Held(server.process.pid), []
    async with server.client() as one, server.client() as other:
        used = {one: DEFAULT_MODEL, other: OTHER_MODEL}
        for client, model in used.items():
            await client.send(type="init", id="i", model=model)
            await client.until("ready", id="i")
        while len(resident) < ROUNDS:
            # At once: while one waited for the other, it would be unloaded.
            await asyncio.gather(*(client.generate(prompt=PROMPTS[0], max_tokens=24) for client in used))
            if len((await one.settle())["models"]) == len(used):
                resident.append(held.resident)
    return int(statistics.median(resident))


async def busy(tenants: list[Tenant], seconds: float) -> None:
    """Let all of them act for a time."""
    end = asyncio.get_running_loop().time() + seconds

    async def go_on(tenant: Tenant) -> None:
        while asyncio.get_running_loop().time() < end:
            await tenant.act()

    async with asyncio.TaskGroup() as group:
        for tenant in tenants:
            group.create_task(go_on(tenant))


@pytest.mark.torture
@pytest.mark.timeout(WHOLE + 10 * MINUTE)
async def test_memory_stays_what_it_was(tmp_path: Path) -> None:
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    command = (*COMMAND, "--port", "0", "--model", DEFAULT_MODEL, "--log-level", "error", *options)
    async with process(tmp_path, *command) as server:
        assert "serving" in await server.says()
        tenants = [Tenant(server, random.Random(seed)) for seed in range(CLIENTS)]
        await busy(tenants, BEFORE)
        early = await at_rest(server)
        await busy(tenants, WHOLE - BEFORE)
        late = await at_rest(server)
        counts = sum((tenant.counts for tenant in tenants), Counter())
        told = f"{early >> 20} MiB at minute five, {late >> 20} at the end; {counts}"
        (tmp_path / "told").write_text(told)
        assert late < GROWTH * early, told
        assert min(counts[name] for name in ("load", "answer", "cancel", "resume", "hang_up")) > 20
        server.signal()
        assert await server.ends() == 0
        assert "Traceback" not in server.stderr
