"""Clients that mean harm, all of them at once, and one beside them that does not: it is served, and nothing is left."""

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.hostile import AT_ONCE, ATTACKS, HALF_OPEN, IDS
from tests.conftest import ECHO, Client
from tests.test_main import Process, process
from tests.torture.test_torture import ANSWER, PACE, Held, nothing_is_left

# Bytes that the allocator may keep of the first two thousand connections, and by which memory may grow after that.
KEPT, ROOM = 64 << 20, 16 << 20


@contextlib.asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Process]:
    """Run a server whose model takes its time, with the limits that every server has."""
    options = ("--model", ECHO, "--port", "0", "--log-level", "warning")
    async with process(tmp_path, sys.executable, "-m", "bench.sides.paced_echo", PACE, *options) as running:
        assert "serving" in await running.says()
        yield running


async def attacked(server: Process, client: Client, seconds: int) -> dict[str, dict[str, int]]:
    """Attack a server for a time, while a client is served whole; give what the attackers did and what came of it."""
    attackers = (sys.executable, "-m", "bench.hostile", server.url.split("/")[2], f"{seconds}")
    with tempfile.TemporaryDirectory() as folder:
        async with process(Path(folder), *attackers) as attack:
            assert await attack.says() == "attacking"
            ended = asyncio.create_task(attack.says())
            while not ended.done():
                done = await client.generate(prompt=ANSWER)
                assert (done["joined"], done["finish_reason"]) == (ANSWER, "stop")
            came_of: dict[str, dict[str, int]] = json.loads(ended.result() or "{}")
            assert came_of.keys() == ATTACKS.keys(), attack.stderr
    return came_of


async def withstands(tmp_path: Path, *seconds: int) -> dict[str, dict[str, int]]:
    """Attack a server, so many seconds each time; give what came of the last attack."""
    async with serving(tmp_path) as server, server.client() as client:
        held = Held(server.process.pid)
        await client.generate(prompt="the model is loaded")
        descriptors, resident = held.descriptors, [held.resident]
        for duration in seconds:
            came_of = await attacked(server, client, duration)
            await nothing_is_left(client, held, descriptors)
            resident.append(held.resident)
        assert resident[1] - resident[0] < KEPT
        assert resident[-1] - resident[1] < ROOM
        server.signal()
        assert await server.ends() == 0
        assert "Traceback" not in server.stderr
        assert "never retrieved" not in server.stderr
        return came_of


async def test_who_means_no_harm_is_served_beside_every_attack(tmp_path: Path) -> None:
    came_of = await withstands(tmp_path, 3)
    assert all(came_of.values())


@pytest.mark.torture
@pytest.mark.timeout(300)
async def test_who_means_no_harm_is_served_beside_every_attack_for_long(tmp_path: Path) -> None:
    # Half-open connections are given up after ten seconds: the allocator has had its busiest moment some time after that.
    came_of = await withstands(tmp_path, 40, 60)
    assert came_of["half-open sockets"]["connections"] >= HALF_OPEN
    assert came_of["ids"]["messages"] >= IDS
    assert came_of["tiny messages"]["messages"] >= 1_000_000
    assert came_of["bombs"]["bombs"] > AT_ONCE  # the first ones were answered with a close
    cut_off = {name for name, counts in came_of.items() if counts.get("cut off")}
    assert {"slow handshakes", "pings", "ids", "foreign cancels", "tiny messages"} <= cut_off
