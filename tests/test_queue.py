"""The line before a model, as clients see it: places that are true, turns between connections, a bound."""

import pytest

from tests.conftest import Client, Running, eventually
from tests.scripted import ScriptedModel, scripted

ELSEWHERE = ("127.0.0.2", 0)  # an address of its own makes another client


async def in_line(server: Running, waiting: int) -> None:
    await eventually(lambda: sum(entry["queued"] for entry in server.models.status()) == waiting)


async def one_too_many(server: Running, model: ScriptedModel, client: Client, id: str) -> None:
    """Ask for one more than may wait; a model in a step reads that when the step has ended."""
    await client.send(type="generate", id=id, prompt=id)
    if model.steps:
        await in_line(server, 5)
        model.step_gate.let(1)
    await in_line(server, 4)


async def through_the_load(server: Running, model: ScriptedModel, requests: int) -> None:
    """Let a load end, and wait until all who waited for it are with the engine."""
    model.load_gate.open()
    (loaded,) = server.models._models.values()
    await eventually(lambda: len(loaded.engine._streams) == requests)


async def ask(server: Running, client: Client, ids: str, already: int = 0) -> None:
    for place, id in enumerate(ids, already + 1):
        await client.send(type="generate", id=id, prompt=id)
        await in_line(server, place)


@pytest.fixture(params=["a place", "a load"])
async def busy(request: pytest.FixtureRequest):
    """A server in front of whose model a line forms, and what lets it move on."""
    async with scripted(loaded=request.param == "a place", max_active=1, max_queue=4) as (server, model):
        if request.param == "a load":
            model.load_gate.shut()
            yield server, model
            return
        async with server.client() as first:
            await first.send(type="generate", id="first", prompt="first")
            await first.until("started")
            yield server, model


async def test_two_connections_are_served_in_turn_however_many_one_asked_for(busy) -> None:
    server, model = busy
    async with server.client() as heavy, server.client(local_addr=ELSEWHERE) as light:
        await ask(server, heavy, "abc")
        await ask(server, light, "x", already=3)
        await through_the_load(server, model, 4 + bool(model.steps))
        model.open()
        for client, ids in ((heavy, "abc"), (light, "x")):
            for id in ids:
                assert (await client.done(id))["finish_reason"] == "stop"
        served = [batch[0].sequence.request.key[1] for batch in model.steps]
        order = [id for id in dict.fromkeys(served) if id != "first"]
        if "first" in served:
            assert order == ["a", "x", "b", "c"]
        else:
            # Prompts that waited for a load come to the engine as their encoding ends, and the first of them runs at once.
            assert order.index("x") <= 2


async def test_a_place_in_line_is_told_again_when_somebody_comes_in_between(busy) -> None:
    server, model = busy
    async with server.client() as heavy, server.client(local_addr=ELSEWHERE) as light:
        await ask(server, heavy, "abc")
        model.step_gate.let(1)
        assert (await heavy.until("queued", id="c"))["position"] == 3
        await ask(server, light, "x", already=3)
        model.step_gate.let(1)
        assert (await light.until("queued", id="x"))["position"] == 2
        assert (await heavy.until("queued", id="c"))["position"] == 4
        model.open()
        await heavy.done("c")
        await light.done("x")


async def test_over_the_bound_the_one_who_would_be_served_last_is_told_when_to_come_again(busy) -> None:
    server, model = busy
    async with server.client() as heavy, server.client(local_addr=ELSEWHERE) as light:
        await ask(server, heavy, "abcd")
        await one_too_many(server, model, heavy, "e")
        error = (await heavy.done("e"))["error"]
        assert error["code"] == "overloaded"
        assert 100 <= error["retry_after_ms"] <= 60_000
        assert "try again in" in error["message"]
        # A client that asked for less takes the place of the other one's last.
        await one_too_many(server, model, light, "x")
        assert (await heavy.done("d"))["error"]["code"] == "overloaded"
        model.open()
        assert (await light.done("x"))["finish_reason"] == "stop"
        assert [(await heavy.done(id))["finish_reason"] for id in "abc"] == ["stop"] * 3


async def test_one_client_with_fifty_requests_does_not_starve_one_with_a_single_one() -> None:
    async with scripted(max_active=1) as (server, model), server.client() as heavy, server.client() as light:
        for number in range(50):
            await heavy.send(type="generate", id=str(number), prompt="hello")
        await eventually(lambda: sum(entry["active"] + entry["queued"] for entry in server.models.status()) == 50)
        await light.send(type="generate", id="x", prompt="x")
        await eventually(lambda: sum(entry["active"] + entry["queued"] for entry in server.models.status()) == 51)
        model.open()
        await light.done("x")
        await heavy.done("49")
        served = list(dict.fromkeys(batch[0].sequence.request.key[1] for batch in model.steps))
        assert served.index("x") <= 2
