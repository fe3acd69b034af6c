"""The line before a model, as clients see it: places that are true, turns between connections, a bound."""

import contextlib

import pytest

from tests.conftest import Client, Running, eventually, keyed
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
    async with scripted(
        loaded=request.param == "a place", max_active=1, max_queue=4, keys=keyed("first", "heavy", "light")
    ) as (server, model):
        if request.param == "a load":
            model.load_gate.shut()
            yield server, model
            return
        async with server.client_of("first") as first:
            await first.send(type="generate", id="first", prompt="first")
            await first.until("started")
            yield server, model


async def test_two_connections_are_served_in_turn_however_many_one_asked_for(busy) -> None:
    server, model = busy
    async with server.client_of("heavy") as heavy, server.client_of("light") as light:
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


async def test_a_place_in_line_is_told_again_when_somebody_comes_in_between(busy, monkeypatch) -> None:
    monkeypatch.setattr("LLM.engine.worker.POSITIONS_INTERVAL", 0)
    server, model = busy
    async with server.client_of("heavy") as heavy, server.client_of("light") as light:
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
    async with server.client_of("heavy") as heavy, server.client_of("light") as light:
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
    keys = keyed("heavy", "light")
    async with (
        scripted(max_active=1, keys=keys) as (server, model),
        server.client_of("heavy") as heavy,
        server.client_of("light") as light,
    ):
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


async def test_fifty_connections_of_one_client_are_one_client_and_anothers_request_is_next() -> None:
    async with contextlib.AsyncExitStack() as clients:
        server, model = await clients.enter_async_context(scripted(max_active=1, keys=keyed("heavy", "light")))
        heavy = [await clients.enter_async_context(server.client_of("heavy")) for _ in range(50)]
        for client in heavy:
            await client.send(type="generate", id="g", prompt="hello")
        await eventually(lambda: sum(entry["active"] + entry["queued"] for entry in server.models.status()) == 50)
        light = await clients.enter_async_context(server.client_of("light"))
        await light.send(type="generate", id="x", prompt="x")
        await eventually(lambda: sum(entry["active"] + entry["queued"] for entry in server.models.status()) == 51)
        model.step_gate.let(1)
        assert (await light.until("queued"))["position"] <= 2
        model.open()
        await light.done("x")
        served = list(dict.fromkeys(batch[0].sequence.request.key for batch in model.steps))
        assert [key[1] for key in served].index("x") <= 2


async def test_two_clients_cannot_fill_the_line_for_a_third(busy) -> None:
    server, model = busy
    async with server.client_of("heavy") as heavy, server.client_of("first") as second, server.client_of("light") as light:
        await ask(server, heavy, "ab")
        await ask(server, second, "cd", already=2)
        await one_too_many(server, model, light, "x")
        refused = await second.done("d")
        assert refused["error"]["code"] == "overloaded"
        model.open()
        assert (await light.done("x"))["finish_reason"] == "stop"


async def test_the_users_of_one_key_share_its_turns() -> None:
    async with scripted(max_active=1, keys=keyed("key")) as (server, model), server.client_of("key") as client:
        for number in range(9):
            await client.send(type="generate", id=f"a{number}", prompt="hello", user="anna")
        await eventually(lambda: sum(entry["active"] + entry["queued"] for entry in server.models.status()) == 9)
        await client.send(type="generate", id="b", prompt="hello", user="ben")
        await eventually(lambda: sum(entry["active"] + entry["queued"] for entry in server.models.status()) == 10)
        model.open()
        await client.done("a8")
        served = list(dict.fromkeys(batch[0].sequence.request.key[1] for batch in model.steps))
        assert served.index("b") <= 2
