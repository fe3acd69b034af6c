"""Many clients, a bad network, a real server process: whatever happens, every id keeps its promise, and nothing is left."""

import asyncio
import contextlib
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench.sides.websocket import ONE_CLIENT_MAY
from tests.asked import Resumable
from tests.conftest import ECHO, Client
from tests.test_main import Process, process
from tests.torture.client import Line, TorturedClient
from tests.torture.proxy import Proxy

PACE = "1"  # milliseconds of a step
SETTLING = 60.0  # seconds for the server to let go of what it had
VANISHED = 35.0  # seconds for it to find that a peer is gone that said nothing; it is to take 30
ANSWER = "".join(random.Random(64).choices("abcdefghij", k=64))
# Bytes by which memory may grow: the allocator's, and what the prefix cache keeps of every prompt, up to its bound.
ROOM = 24 << 20


class Held:
    """What a server process holds, from outside: file descriptors and memory."""

    def __init__(self, pid: int) -> None:
        self._process = Path(f"/proc/{pid}")

    @property
    def descriptors(self) -> int:
        return len(self.open_files)

    @property
    def open_files(self) -> list[str]:
        """Give what its descriptors are of."""
        found = []
        for file in (self._process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(file.readlink()))
        return sorted(found)

    @property
    def resident(self) -> int:
        """Give the resident memory, in bytes."""
        line = next(line for line in (self._process / "status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024


@contextlib.asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Process]:
    """Run a server whose model takes its time."""
    # A client names the port that it connects to, and that is the proxy's.
    options = ("--model", ECHO, "--port", "0", "--max-active", "8", "--log-level", "warning", "--allow-host", "127.0.0.1")
    may = [f"--{name}={value}" for name, value in ONE_CLIENT_MAY.items()]
    async with process(tmp_path, sys.executable, "-m", "bench.sides.paced_echo", PACE, *options, *may) as running:
        assert "serving" in await running.says()
        yield running


def proxy_to(server: Process) -> Proxy:
    return Proxy(int(server.url.rpartition(":")[2].partition("/")[0]))


async def torture(server: Process, seed: int, clients: int, actions: int) -> Counter[str]:
    """Let clients do so many things each; give what they did, all together."""
    draw = random.Random(seed)
    async with proxy_to(server) as proxy:
        tortured = [TorturedClient(proxy, f"c{i}", random.Random(draw.getrandbits(64))) for i in range(clients)]
        async with asyncio.TaskGroup() as group:
            for client in tortured:
                group.create_task(client.run(actions))
    for client in tortured:
        client.check()
    return sum((client.counts for client in tortured), Counter())


async def nothing_is_left(watcher: Client, held: Held, descriptors: int, seconds: float = SETTLING) -> None:
    """Wait until the server has nothing to do and nothing open but what it had before."""
    busy: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(seconds):
            while True:
                await watcher.generate(prompt="time passes", ignore_eos=True, max_tokens=100)
                status = await watcher.settle()
                busy = [entry for entry in status["models"] if entry["active"] or entry["queued"]]
                if not busy and held.descriptors == descriptors:
                    return
    except TimeoutError:
        raise AssertionError(f"{held.descriptors} descriptors, not {descriptors}: {held.open_files}; {busy}") from None


async def keeps_its_promises(tmp_path: Path, seed: int, clients: int, actions: int) -> None:
    async with serving(tmp_path) as server, server.client() as watcher:
        held = Held(server.process.pid)
        await watcher.generate(prompt="the model is loaded")
        descriptors = held.descriptors
        await torture(server, 0, clients, actions // 10)  # what memory is taken once and kept is taken now
        await nothing_is_left(watcher, held, descriptors)
        resident = held.resident
        counts = await torture(server, seed, clients, actions)
        await nothing_is_left(watcher, held, descriptors)
        assert held.resident - resident < ROOM
        # What did not happen was not shown.
        assert {"stop", "cancelled", "length", "merged", "resumes"} <= counts.keys()
        server.signal()
        assert await server.ends() == 0
        assert "Traceback" not in server.stderr
        assert "never retrieved" not in server.stderr


@pytest.mark.parametrize("seed", range(1, 4))
async def test_every_promise_is_kept_on_a_bad_network(tmp_path: Path, seed: int) -> None:
    await keeps_its_promises(tmp_path, seed, clients=8, actions=100)


@pytest.mark.torture
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(101, 121))
async def test_every_promise_is_kept_on_a_bad_network_for_long(tmp_path: Path, seed: int) -> None:
    await keeps_its_promises(tmp_path, seed, clients=24, actions=400)


async def test_a_cut_at_any_token_leaves_the_same_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, proxy_to(server) as proxy:
        assert {await answer_cut_at(proxy, place) for place in range(len(ANSWER) + 1)} == {ANSWER}


async def answer_cut_at(proxy: Proxy, place: int) -> str:
    """Give an answer as a client has it whose connection was cut behind so many tokens, and who came back."""
    resumable: Resumable = {}
    cuts: list[int] = []

    def cut(line: Line, frame: dict[str, Any]) -> None:
        asked = next(iter(resumable.values()), None)
        if asked and asked.next_seq >= place and not cuts:
            cuts.append(asked.next_seq)
            line.link.cut()

    first = await Line.through(proxy, resumable, cut)
    await first.send(type="generate", id="g", prompt=ANSWER, max_tokens=len(ANSWER), resumable=True)
    await first.ended()
    second = await Line.through(proxy, resumable, lambda line, frame: None)
    [(_, token)] = resumable
    await second.send(type="resume", id="g", resume_token=token, after_seq=cuts[0])
    await second.until(lambda: not second.checker.open_questions())
    await second.leave()
    return second.checker.texts["g"]


@pytest.mark.torture
@pytest.mark.parametrize(
    "asked", [None, {"prompt": "on and on ", "ignore_eos": True, "max_tokens": 60_000}], ids=["idle", "full"]
)
async def test_a_peer_that_vanished_is_found_and_its_work_stops(tmp_path: Path, asked: dict[str, Any] | None) -> None:
    async with serving(tmp_path) as server, server.client() as watcher, proxy_to(server) as proxy:
        held = Held(server.process.pid)
        await watcher.generate(prompt="the model is loaded")
        descriptors = held.descriptors
        line = await Line.through(proxy, {}, lambda line, frame: None)
        if asked:
            await line.send(type="generate", id="g", **asked)
            await line.until(lambda: line.frames > 10)
        await line.link.half_open()
        await nothing_is_left(watcher, held, descriptors, VANISHED)
