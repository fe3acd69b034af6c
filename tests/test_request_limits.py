"""Each limit of requests and tokens over real sockets, at it and over it: whoever is not over it is served."""

from typing import Any

import pytest

from tests.conftest import Client, Running, eventually, running
from tests.scripted import in_engine, scripted
from tests.test_auth import BOB, KEY, bearer, keys
from tests.test_client_limits import ELSEWHERE, let_in

# Requests.


async def test_one_request_too_many_of_a_connection_is_refused_and_the_others_go_on() -> None:
    async with scripted(max_requests_per_connection=2) as (server, model), server.client() as client:
        for id in ("first", "second", "third"):
            await client.send(type="generate", id=id, prompt="hello")
        assert (await client.until("done"))["error"]["code"] == "overloaded"
        async with server.client() as other:
            model.open()
            assert (await other.generate(prompt="hello"))["joined"] == "hello"
        await client.done("first")
        await client.done("second")
        assert client.checker.texts == {"first": "hello", "second": "hello", "third": ""}
        assert (await client.generate(id="fourth", prompt="hello"))["joined"] == "hello"


async def test_the_connections_of_one_address_share_a_bound_of_requests() -> None:
    async with scripted(max_requests_per_key=2) as (server, model), server.client() as client, server.client() as same:
        await client.send(type="generate", id="a", prompt="hello")
        await same.send(type="generate", id="b", prompt="hello")
        await in_engine(server, 2)
        await client.send(type="generate", id="c", prompt="hello")
        done = await client.done("c")
        assert (done["error"]["code"], "2 requests of this client" in done["error"]["message"]) == ("overloaded", True)
        async with server.client(local_addr=ELSEWHERE) as other:
            await other.send(type="generate", id="d", prompt="hello")
            await in_engine(server, 3)
            model.open()
            await other.done("d")
            assert other.checker.texts == {"d": "hello"}
        await same.done("b")
        assert (await same.generate(id="e", prompt="hello"))["joined"] == "hello"


async def test_a_key_shares_a_bound_from_wherever_it_comes_and_another_key_beside_it_has_its_own() -> None:
    alice, bob = bearer(KEY), bearer(BOB)
    async with scripted(keys=keys(), max_requests_per_key=1) as (server, model), server.client(**alice) as client:
        await client.send(type="generate", id="a", prompt="hello")
        await in_engine(server, 1)
        async with server.client(local_addr=ELSEWHERE, **alice) as same, server.client(**bob) as other:
            done = await same.generate(id="b", prompt="hello")
            assert (done["error"]["code"], "1 requests of this client" in done["error"]["message"]) == ("overloaded", True)
            model.open()
            assert (await other.generate(id="c", prompt="hello"))["joined"] == "hello"
        await client.done("a")
        assert client.checker.texts == {"a": "hello"}


async def test_tokens_of_a_key_are_counted_wherever_it_comes_from() -> None:
    async with running(keys=keys(), tokens_per_minute=6) as server, server.client(**bearer(KEY)) as client:
        assert (await client.generate(id="a", prompt="hello"))["joined"] == "hello"
        async with server.client(local_addr=ELSEWHERE, **bearer(KEY)) as same, server.client(**bearer(BOB)) as other:
            assert (await same.generate(id="b", prompt="hello"))["error"]["code"] == "rate_limited"
            assert (await other.generate(id="c", prompt="hello"))["joined"] == "hello"


async def test_requests_that_wait_have_a_bound_of_their_own() -> None:
    async with scripted(max_active=1, max_queued_per_key=1) as (server, model), server.client() as client:
        await client.send(type="generate", id="runs", prompt="hello")
        await client.until("started")
        await client.send(type="generate", id="waits", prompt="hello")
        await client.send(type="generate", id="refused", prompt="hello")
        done = await client.done("refused")
        assert (done["error"]["code"], "1 requests of this client wait" in done["error"]["message"]) == ("overloaded", True)
        model.open()
        await client.until("started", id="waits")
        assert (await client.generate(id="again", prompt="hello"))["joined"] == "hello"


async def test_a_lost_connections_requests_count_until_they_are_gone_and_no_longer() -> None:
    async with scripted(max_requests_per_key=2) as (server, model), server.client() as client:
        async with server.client() as lost:
            await lost.send(type="generate", id="lost", prompt="hello")
            await model.in_step(1)
            await lost.send(type="generate", id="kept", prompt="hello", resumable=True)
            await in_engine(server, 2)
            model.step_gate.let(2)
            await lost.until("started", id="kept")
            assert (await client.generate(id="a", prompt="hello"))["error"]["code"] == "overloaded"
        await eventually(lambda: account(server).requests == 1)
        await client.send(type="generate", id="b", prompt="hello")
        await client.settle()
        assert (await client.generate(id="c", prompt="hello"))["error"]["code"] == "overloaded"
        model.open()
        await eventually(lambda: account(server).requests == 0)
        assert account(server).queued == 0


def account(server: Running) -> Any:
    """Give the account of those who come from this machine's usual address."""
    (found,) = server.server.state.accounts._accounts.values()
    return found


# Tokens.


async def test_prompts_and_answers_are_as_long_as_the_operator_says() -> None:
    async with running(max_prompt_tokens=5, max_tokens=3) as server, server.client() as client:
        await client.send(type="init", id="i")
        limits = (await client.until("ready"))["limits"]
        assert (limits["max_prompt_tokens"], limits["max_tokens"]) == (5, 3)
        done = await client.generate(id="unsaid", prompt="hello")
        assert (done["joined"], done["finish_reason"]) == ("hel", "length")
        assert (await client.generate(id="at", prompt="hello", max_tokens=3))["finish_reason"] == "length"
        for field in ("max_tokens", "min_tokens"):
            error = (await client.generate(id=field, prompt="hello", **{field: 4}))["error"]
            assert (error["code"], error["message"].partition(":")[0]) == ("bad_message", f"$.{field}")
        for message in ({"prompt": "hello!"}, {"messages": [{"role": "user", "content": "hello!"}]}):
            error = (await client.generate(id="long", **message))["error"]
            field = next(iter(message))
            assert (error["code"], error["message"].partition(":")[0]) == ("context_length_exceeded", f"$.{field}")


async def test_without_a_limit_of_tokens_none_is_told(client: Client) -> None:
    await client.send(type="init", id="i")
    assert set((await client.until("ready"))["limits"]) == {"max_message_bytes", "max_active"}


async def test_tokens_are_counted_by_the_minute_over_all_connections_of_a_client() -> None:
    async with running(tokens_per_minute=12) as server, server.client() as client, server.client() as same:
        assert (await client.generate(id="a", prompt="hello"))["usage"]["completion_tokens"] == 6  # and 5 of the prompt
        assert (await same.generate(id="b", prompt="hello"))["joined"] == "hello"  # there was one left
        error = (await client.generate(id="c", prompt="hello"))["error"]
        assert error["code"] == "rate_limited"
        assert 50_000 < error["retry_after_ms"] <= 55_000  # eleven tokens, five seconds each
        async with server.client(local_addr=ELSEWHERE) as other:
            assert (await other.generate(id="d", prompt="hello"))["joined"] == "hello"
        await client.settle()  # what costs no tokens is served


async def test_a_prompt_that_is_refused_for_its_length_has_cost_what_was_read_of_it() -> None:
    async with running(tokens_per_minute=12, max_prompt_tokens=5) as server, server.client() as client:
        for id in "ab":
            assert (await client.generate(id=id, prompt="hello!"))["error"]["code"] == "context_length_exceeded"
        assert (await client.generate(id="c", prompt="hello"))["error"]["code"] == "rate_limited"


@pytest.mark.parametrize("lost", [True, False])
async def test_a_generation_that_is_cancelled_or_lost_has_cost_what_it_made(lost: bool) -> None:
    async with scripted(tokens_per_minute=8) as (server, model), server.client() as client:
        async with server.client() as other:
            await other.send(type="generate", id="g", prompt="hello", ignore_eos=True)
            for _ in range(3):
                model.step_gate.let()
                await other.until("token")
            if not lost:
                await other.send(type="cancel", id="g")
                model.open()
                await other.done("g")
        model.open()
        await eventually(lambda: account(server).requests == 0)
        assert (await client.generate(id="g", prompt="hello"))["error"]["code"] == "rate_limited"


async def test_what_is_over_when_all_have_gone_is_nothing() -> None:
    async with running() as server:
        for _ in range(3):
            async with server.client() as client:
                await client.generate(prompt="hello")
                await client.send(type="generate", prompt="x" * 1000, ignore_eos=True)
                await client.until("started")
        await let_in(server, 0)
        await eventually(lambda: not account(server).used)
