"""Tokens that never show, of the real default model: they count like any others, and end where nobody hears them."""

from typing import Any

import pytest

from tests.conftest import DEFAULT_MODEL, Running, eventually, running

BIAS = 100.0
MOST = 40
# What a generation asks for that shows nothing for long, or nothing but what no character can be made of.
HIDDEN: dict[str, dict[str, Any]] = {
    "special": {"logit_bias": {"2": BIAS}, "ignore_eos": True},  # <|im_end|>
    "byte": {"logit_bias": {"178": BIAS}},
}


@pytest.fixture
async def server() -> Any:
    async with running(DEFAULT_MODEL, max_detached_tokens=MOST) as server:
        yield server


def charged(server: Running) -> int:
    """How many tokens the one generation has cost its client so far, its prompt's included."""
    (job,) = server.server.resumables
    return job._bill._charged


@pytest.mark.parametrize("kind", HIDDEN)
async def test_they_are_told_and_charged_as_they_are_made_and_end_where_nobody_hears_them(
    server: Running, kind: str
) -> None:
    async with server.client() as client, server.client() as other:
        asked = {"prompt": "Hello", "max_tokens": 2000, "temperature": 0, "resumable": True, **HIDDEN[kind]}
        await client.send(type="generate", id="g", logprobs=1, **asked)
        frame = await client.until("token")
        assert frame["n"] == len(frame["logprobs"]) <= 33
        while client.asked("g").next_seq < 32:
            await client.until("token")
        assert charged(server) > 32
        client.socket.transport.abort()
        await eventually(lambda: all(job.ended for job in server.server.resumables), seconds=120)
        await other.resume(client, "g")
        done = await other.done("g")
        assert done["finish_reason"] == "length"
        assert MOST < done["usage"]["completion_tokens"] < 400
