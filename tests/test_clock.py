"""Waiting for time to pass, and for nothing else."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from LLM.engine.clock import MONOTONIC
from wsserver.client import dialing
from wsserver.sessions import backlog


@pytest.mark.parametrize("pass_by", [MONOTONIC.pass_by, dialing._pass, backlog._pass])
async def test_a_cancel_in_the_very_turn_in_which_the_time_is_over_harms_nothing(
    pass_by: Callable[[float], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
):
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    later = loop.call_later

    def call_later(*arguments: object) -> asyncio.TimerHandle:
        timers.append(later(*arguments))  # type: ignore[arg-type]
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", call_later)
    waiting = asyncio.ensure_future(pass_by(3600.0))
    await asyncio.sleep(0)
    waiting.cancel()
    timers[0]._callback(*timers[0]._args)  # type: ignore[attr-defined]
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert timers[0].cancelled()
