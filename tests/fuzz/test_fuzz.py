"""A short run of what `make fuzz` does for long, with hypothesis to choose and to shrink; and that it finds bugs."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers import HANDLERS
from LLM.model_service import ModelService
from tests.fuzz.__main__ import LIFE, main
from tests.fuzz.fuzzed import fuzzing
from tests.fuzz.messages import Draw, life
from wsserver.peer import Peer
from wsserver.protocol import Cancel, Init, Status

FEW = 4_000  # frames
ROOT = Path(__file__).parent.parent.parent


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(lives=st.lists(st.builds(life, st.randoms(use_true_random=False), st.integers(1, 100)), min_size=1, max_size=3))
async def test_nothing_that_a_client_says_harms_the_server_or_another_client(lives: list[list[str]]) -> None:
    async with fuzzing() as fuzz:
        for frames in lives:
            await fuzz.live(frames)


async def test_a_run_meets_every_answer_there_is_to_a_client() -> None:
    tasks, draw = asyncio.all_tasks(), Draw(1)
    async with fuzzing() as fuzz:
        while fuzz.frames < 2 * FEW:
            await fuzz.live(life(draw, draw.randint(1, LIFE)))
    assert asyncio.all_tasks() <= tasks
    refusals = (
        "bad_json, bad_message, unknown_type, duplicate_id, not_active, resume_expired, model_not_found, unauthenticated"
    )
    over = "rate_limited, close 4400, close 4429"
    served = "ready, started, resumed, token, stop, length, cancelled, status"
    assert {*refusals.split(", "), *over.split(", "), *served.split(", ")} <= fuzz.told.keys()


def fragile(message: Init, peer: Peer, models: ModelService) -> None:
    {None: 16, "none": 16, "int8": 8}[message.quantization]  # and there are more


def talking_nonsense(message: Status, peer: Peer, models: ModelService) -> None:
    peer.reply({"type": "surprise"})  # type: ignore[arg-type]


def stopping_everybody(message: Cancel, peer: Peer, models: ModelService) -> None:
    for model in models._models.values():
        for key in list(model.engine._streams):
            model.engine.cancel(key)


@pytest.mark.parametrize(
    ("kind", "broken", "sign"),
    [(Init, fragile, "nf4|fp4"), (Status, talking_nonsense, "surprise"), (Cancel, stopping_everybody, "'cancelled'")],
)
async def test_a_message_handler_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, kind: Any, broken: Callable[[Any, Peer, ModelService], None], sign: str
) -> None:
    monkeypatch.setitem(HANDLERS, kind, broken)
    with pytest.raises((AssertionError, KeyError, msgspec.ValidationError), match=sign):
        await main(20 * FEW)  # far more than it takes: it ends with the first thing that is wrong


LEAK = """
import asyncio, sys
from handlers import HANDLERS
from tests.fuzz.__main__ import LIFE, main
from wsserver.protocol import Status

def keeping(message, peer, models, kept=[]):
    kept.append(b"x" * 1_000_000 if len(kept) < 100 else b"")

if sys.argv[1] == "a leak":
    HANDLERS[Status] = keeping
sys.exit(asyncio.run(main(8_000)))
"""


@pytest.mark.parametrize(("what", "code"), [("a leak", 1), ("none", 0)])
def test_memory_that_is_not_given_back_is_found(what: str, code: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LEAK, what], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (run.returncode, run.stderr) == (code, "")
    assert "MiB: " in run.stdout
