"""A short run of what `make fuzz` does for long, with hypothesis to choose and to shrink; see tests/fuzz.py."""

import asyncio
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers import HANDLERS
from tests.fuzz import fuzzing, life
from wsserver.protocol import Status


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(lives=st.lists(st.builds(life, st.randoms(use_true_random=False), st.integers(1, 100)), min_size=1, max_size=3))
async def test_nothing_that_a_client_says_harms_the_server_or_another_client(lives: list[list[str]]) -> None:
    async with fuzzing() as fuzz:
        for frames in lives:
            await fuzz.live(frames)


async def test_a_run_meets_every_answer_there_is_to_a_client() -> None:
    tasks = asyncio.all_tasks()
    draw = random.Random(5)
    async with fuzzing() as fuzz:
        while fuzz.frames < 8_000:
            await fuzz.live(life(draw, 700))
    assert asyncio.all_tasks() <= tasks
    assert fuzz.answers > 20
    refusals = {"bad_json", "bad_message", "unknown_type", "duplicate_id", "not_active", "resume_expired", "model_not_found"}
    over = {"rate_limited", "close 4400", "close 4429"}
    served = {"ready", "started", "resumed", "token", "stop", "length", "cancelled", "status"}
    assert refusals | over | served <= fuzz.told.keys()


@pytest.mark.parametrize("how", ["raises", "says nonsense"])
async def test_a_server_that_fails_is_found(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def broken(message: Status, peer: Any, models: Any) -> None:
        if how == "raises":
            raise RuntimeError("broken")
        peer.reply({"type": "surprise"})

    monkeypatch.setitem(HANDLERS, Status, broken)
    with pytest.raises(Exception, match=r"broken|surprise"):
        async with fuzzing() as fuzz:
            await fuzz.live(life(random.Random(1), 700))
