"""One honest client beside eight that keep every limit and want the whole server, with the real default model."""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.measure import quantile
from bench.tenants import ATTACKS
from tests.conftest import DEFAULT_MODEL, Client
from tests.test_main import COMMAND, Process, process

# A server for many tenants, as README has it: a few rows a step, short prefills beside streams, and
# loads for none but its operator.
OPTIONS = ("--max-active", "4", "--prefill-stretch", "1.2", "--client-loads", "listed")
ANSWERS, TOKENS = 12, 40  # of the honest client, before and beside the attack
SECONDS = 45
FIRST_TOKEN, GAP = 3.0, 1.5  # how much longer each may take beside the attack
WORDS = ("river", "stone", "light", "old", "walks", "over", "under", "winter", "song", "glass")


@dataclass
class Waits:
    """Seconds to first tokens, and between tokens."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        return statistics.median(self.first)

    @property
    def gap(self) -> float:
        return quantile(self.gaps, 0.99)

    def __str__(self) -> str:
        times = (self.first_token, max(self.first), statistics.median(self.gaps), self.gap)
        return "first token {:.1f} (worst {:.1f}), gap {:.1f}, p99 {:.1f} ms".format(*(1000 * seconds for seconds in times))


async def ask(client: Client, draw: random.Random, waits: Waits) -> None:
    """Let an honest client ask one question and read the answer, whole."""
    prompt = "Tell me of the " + " ".join(draw.choices(WORDS, k=6))
    last = time.monotonic()
    await client.send(type="generate", id="q", prompt=prompt, max_tokens=TOKENS, seed=7, ignore_eos=True)
    seen = False
    while (frame := await client.receive())["type"] != "done":
        if frame["type"] == "token":
            now = time.monotonic()
            (waits.gaps if seen else waits.first).append(now - last)
            last, seen = now, True
    assert frame["finish_reason"] == "length", frame
    assert frame["usage"]["completion_tokens"] == TOKENS


async def beside(server: Process, client: Client, draw: random.Random) -> tuple[Waits, str]:
    """Measure the honest client while every attack goes on; give what came of the attacks too."""
    waits = Waits()
    address = server.url.split("/")[2]
    attackers = (sys.executable, "-m", "bench.tenants", address, str(SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        async with process(Path(folder), *attackers) as attack:
            assert await attack.says() == "attacking"
            ended = asyncio.create_task(attack.says())
            while not ended.done():
                await ask(client, draw, waits)
            came_of = ended.result()
            assert came_of, attack.stderr
    assert json.loads(came_of).keys() == ATTACKS.keys()
    return waits, came_of


@pytest.mark.torture
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(10))
async def test_a_client_is_served_beside_those_who_want_all(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    command = (*COMMAND, "--port", "0", "--model", DEFAULT_MODEL, "--log-level", "error", *OPTIONS)
    async with process(tmp_path, *command) as server:
        assert "serving" in await server.says()
        async with server.client() as client:
            quiet = Waits()
            await ask(client, draw, Waits())
            for _ in range(ANSWERS):
                await ask(client, draw, quiet)
            attacked, came_of = await beside(server, client, draw)
            told = f"quiet: {quiet}; attacked: {attacked}; {came_of}"
            assert len(attacked.first) >= ANSWERS, told
            assert attacked.first_token < FIRST_TOKEN * quiet.first_token, told
            assert attacked.gap < GAP * quiet.gap, told
        server.signal()
        assert await server.ends() == 0
        assert "Traceback" not in server.stderr
