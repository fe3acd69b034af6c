"""A short run of what `make fuzz` does for long, with hypothesis to choose and to shrink; and that it finds bugs."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers import HANDLERS
from LLM.model_service import ModelService
from tests.fuzz.__main__ import main
from tests.fuzz.fuzzed import fuzzing
from tests.fuzz.messages import life
from wsserver.peer import Peer
from wsserver.protocol import Cancel, Init, Status

FEW = 4_000  # frames
MIB = 1 << 20


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(lives=st.lists(st.builds(life, st.randoms(use_true_random=False), st.integers(1, 100)), min_size=1, max_size=3))
async def test_nothing_that_a_client_says_harms_the_server_or_another_client(lives: list[list[str]]) -> None:
    async with fuzzing() as fuzz:
        for frames in lives:
            await fuzz.live(frames)


async def test_a_run_meets_every_answer_there_is_to_a_client(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = asyncio.all_tasks()
    assert await main(2 * FEW) == 0
    assert asyncio.all_tasks() <= tasks
    told = capsys.readouterr().out
    refusals = (
        "bad_json, bad_message, unknown_type, duplicate_id, not_active, resume_expired, model_not_found, unauthenticated"
    )
    over = "rate_limited, close 4400, close 4429"
    served = "ready, started, resumed, token, stop, length, cancelled, status"
    assert {*refusals.split(", "), *over.split(", "), *served.split(", ")} <= set(
        re.findall(r"\d+ ([a-z][a-z_ 0-9]*)", told)
    )


def fragile(message: Init, peer: Peer, models: ModelService) -> None:
    {None: 16, "none": 16, "int8": 8, "nf4": 4}[message.quantization]  # and there is a fourth


def talking_nonsense(message: Status, peer: Peer, models: ModelService) -> None:
    peer.reply({"type": "surprise"})  # type: ignore[arg-type]


def stopping_everybody(message: Cancel, peer: Peer, models: ModelService) -> None:
    for model in models._models.values():
        for key in list(model.engine._streams):
            model.engine.cancel(key)


@pytest.mark.parametrize(
    ("kind", "broken", "sign"),
    [(Init, fragile, "fp4"), (Status, talking_nonsense, "surprise"), (Cancel, stopping_everybody, "'cancelled'")],
)
async def test_a_message_handler_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, kind: Any, broken: Callable[[Any, Peer, ModelService], None], sign: str
) -> None:
    monkeypatch.setitem(HANDLERS, kind, broken)
    with pytest.raises((AssertionError, KeyError, msgspec.ValidationError), match=sign):
        await main(20 * FEW)  # far more than it takes: it ends with the first thing that is wrong


async def test_memory_that_is_not_given_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []

    def keeping(message: Status, peer: Peer, models: ModelService) -> None:
        kept.append(b"x" * MIB if len(kept) < 100 else b"")

    monkeypatch.setitem(HANDLERS, Status, keeping)
    assert await main(2 * FEW) == 1
