"""One honest client beside eight that keep every limit and want the whole server, with the real default model."""

import asyncio
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.load import Request, one_after_the_other
from bench.measure import Trace, quantile
from bench.sides.websocket import Client
from bench.tenants import ATTACKS
from tests.conftest import DEFAULT_MODEL
from tests.test_main import COMMAND, Process, process

# The limits that README recommends for many clients that do not know each other.
README = (Path(__file__).parents[2] / "README.md").read_text()
OPTIONS = re.findall(
    r"[^\s\\]+", README.split("For many that do not", 1)[1].split("```sh\nwsserver", 1)[1].split("```", 1)[0]
)
ANSWERS, TOKENS = 5, 24  # of the honest client before the attack, and as many after it: a machine is not always equally fast
THINK = 9  # times as long as an answer takes: reading it. Nine clients' fair share of one place is a ninth of the time
ATTACKED = 20  # the length of the attack, in questions and answers of the quiet phase
FIRST_TOKEN, GAP = 3.0, 1.5  # how much longer each may take beside the attack
WORDS = ("river", "stone", "light", "old", "walks", "over", "under", "winter", "song", "glass")


def questions(draw: random.Random) -> Iterator[Request]:
    while True:
        yield Request("Tell me of the " + " ".join(draw.choices(WORDS, k=6)), TOKENS)


def first_token(traces: list[Trace]) -> float:
    return quantile([trace.ttft for trace in traces], 0.5)


def gap(traces: list[Trace]) -> float:
    return quantile([gap for trace in traces for gap in trace.itls], 0.99)


async def asked_alone(client: Client, draw: random.Random, think: float) -> list[Trace]:
    """Let the honest client ask as it does beside the attack."""
    asked = [next(questions(draw)) for _ in range(1 + ANSWERS)]
    return (await one_after_the_other(client.stream, asked, think))[1:]  # what was there before may still end in the first


async def beside(
    server: Process, client: Client, draw: random.Random, think: float, seconds: float
) -> tuple[list[Trace], str]:
    """Let the honest client ask while every attack goes on; return what came of the attacks too."""
    attackers = (sys.executable, "-m", "bench.tenants", server.url.split("/")[2], str(seconds))
    with tempfile.TemporaryDirectory() as folder:
        async with process(Path(folder), *attackers) as attack:
            assert await attack.says() == "attacking"
            ended = asyncio.create_task(attack.says())
            traces = await one_after_the_other(client.stream, questions(draw), think, lambda: not ended.done())
            came_of = await ended
            assert came_of, attack.stderr
    assert json.loads(came_of).keys() == ATTACKS.keys()
    return traces, came_of


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
async def test_a_client_is_served_beside_those_who_want_all(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    command = (*COMMAND, "--port=0", f"--model={DEFAULT_MODEL}", "--log-level=error", *OPTIONS)
    async with process(tmp_path, *command) as server:
        assert "serving" in await server.says()
        client = await Client.connect(server.url)
        _, known = [await client.stream(next(questions(draw))) for _ in range(2)]  # the first one warms up
        answer = known.ended - known.sent
        think = THINK * answer
        quiet = await asked_alone(client, draw, think)
        attacked, came_of = await beside(server, client, draw, think, ATTACKED * (think + answer))
        quiet += await asked_alone(client, draw, think)
        told = {
            "first token": [1000 * first_token(traces) for traces in (quiet, attacked)],
            "p99 gap": [1000 * gap(traces) for traces in (quiet, attacked)],
            "answers": len(attacked),
        }
        (tmp_path / "told").write_text(f"{told} {came_of}")
        assert len(attacked) > ATTACKED // 2, told
        assert first_token(attacked) < FIRST_TOKEN * first_token(quiet), told
        assert gap(attacked) < GAP * gap(quiet), told
        await client.socket.close()
        server.signal()
        assert await server.ends() == 0
        assert "Traceback" not in server.stderr
