"""What has ended is free at once: what only a full collection finds makes all streams stand still while it is looked for."""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

from tests.conftest import Running, eventually, running
from tests.scripted import in_engine, scripted
from tests.test_client_limits import half_open, let_in
from tests.test_server import get
from wsserver.__main__ import new_event_loop

LONG = "y" * 3000


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """See that a collection after it finds nothing of the server's."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage)
        ours = ("wsserver.", "handlers.", "LLM.", "websockets.server.", "websockets.asyncio.server.")
        assert not {kind: count for kind, count in kinds.items() if kind.startswith(ours)}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def all_gone(server: Running) -> None:
    await let_in(server, 0)
    await eventually(lambda: not server.server._connections and not server.server._listener.handler_tasks)
    await asyncio.sleep(0)  # in which the last task's frames go


def on_the_servers_loop(check: Coroutine[Any, Any, None]) -> None:
    """Run a check on the loop of the product: asyncio's own has transports that know themselves."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(check)


@pytest.mark.parametrize("resumable", [False, True])
def test_a_generation_that_was_cancelled_leaves_nothing(resumable: bool) -> None:
    async def check() -> None:
        async with scripted() as (server, model), server.client() as client:
            model.open()
            await client.generate(prompt="hello")
            model.step_gate.shut()
            with nothing_left():
                await client.send(type="generate", id="g", prompt=LONG, resumable=resumable)
                await client.send(type="generate", id="waits", prompt=LONG)
                await in_engine(server, 2)
                await client.send(type="cancel")
                await client.settle()
                model.open()
                for id in ("g", "waits"):
                    assert (await client.done(id))["finish_reason"] == "cancelled"
                await client.settle()

    on_the_servers_loop(check())


@pytest.mark.parametrize("how", ["closes", "vanishes", "floods"])
def test_a_connection_that_ends_leaves_nothing(how: str) -> None:
    async def check() -> None:
        async with running(messages_per_second=1.0, handshakes_per_second=100.0) as server:
            async with server.client() as client:
                await client.generate(prompt="hello")
            await all_gone(server)
            with nothing_left():
                async with server.client() as client:
                    await client.send(type="generate", id="g", prompt=LONG, max_tokens=3000)
                    await client.until("started")
                    if how == "vanishes":
                        client.socket.transport.abort()
                    if how == "floods":
                        client.socket.transport.write(200 * Frame(Opcode.PING, b"").serialize(mask=True))
                        await client.socket.wait_closed()
                del client
                await all_gone(server)

    on_the_servers_loop(check())


@pytest.mark.parametrize("said", [b"", b"GET /ws HTTP/1.1\r\n", b"hello\r\n", b"GET / HTTP/1.1\r\nHost\r\n\r\n"])
def test_who_never_became_a_client_leaves_nothing(said: bytes) -> None:
    async def check() -> None:
        async with running(handshake_timeout=0.2) as server:
            await get(server, "/")
            await all_gone(server)
            with nothing_left():
                async with half_open(server, said) as reader:
                    with contextlib.suppress(ConnectionResetError):
                        await reader.read()
                await get(server, "/")
                await all_gone(server)

    on_the_servers_loop(check())
