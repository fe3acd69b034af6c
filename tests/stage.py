"""Where clients are tested: a server with a scripted model, behind a proxy whose connections the test cuts.

Between two dials the Python client waits for the test, and for no clock.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import Running, eventually, stopping
from tests.scripted import ScriptedModel, scripted
from tests.torture.proxy import PROXIED, Proxy
from wsserver.client import Client, connect, dialing

TEXT = "0123456789abcdef" * 4  # 64 tokens of one character
MORE = "test/more"
MOST = "test/most"


class Stage:
    """A server with a scripted model, and a client that reaches it through a proxy."""

    def __init__(self, server: Running, model: ScriptedModel, proxy: Proxy) -> None:
        self.server = server
        self.model = model
        self.proxy = proxy
        self.url = f"ws://127.0.0.1:{proxy.port}/ws"
        self.states: list[str] = []
        self.may_dial = asyncio.Event()
        self.may_dial.set()

    async def pass_by(self, seconds: float) -> None:
        """Stand in for the wait between two dials."""
        await self.may_dial.wait()

    def connect(self, **options: Any) -> Client:
        return connect(self.url, on_state=self.states.append, **options)

    async def in_state(self, state: str) -> None:
        await eventually(lambda: self.states[-1:] == [state])

    async def lose(self) -> None:
        """Cut the connection, and wait until both sides know; `may_dial` lets the client come back."""
        self.may_dial.clear()
        for link in self.proxy.links.values():
            link.cut()
        await self.in_state("reconnecting")
        await eventually(lambda: all(job.listener is None for job in self.server.server.resumables))

    async def lose_and_regain(self) -> None:
        """Cut the connection, and wait for the next one."""
        await self.lose()
        self.may_dial.set()
        await self.in_state("connected")

    async def stopping(self) -> None:
        """Wait until the server has read a cancel."""
        await stopping(self.server)

    async def idle(self) -> None:
        """Wait until the server runs nothing, for whomever."""
        await eventually(lambda: not any(entry["active"] or entry["queued"] for entry in self.server.models.status()))
        await eventually(lambda: not self.model.held())


@contextlib.asynccontextmanager
async def staged(**settings: Any) -> AsyncIterator[Stage]:
    async with scripted(allow_host=PROXIED, **settings) as (server, model), Proxy(server.server.port) as proxy:
        stage = Stage(server, model, proxy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dialing, "_pass", stage.pass_by)
            yield stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged() as stage:
        yield stage


async def read(pieces: AsyncIterator[str], model: ScriptedModel, tokens: int) -> str:
    """Read so many tokens of one character, one after the other, and no further."""
    text = ""
    while len(text) < tokens:
        model.step_gate.let(1)
        text += await anext(pieces)
    return text
