"""One client tries to see, stop, take up or guess what another one does, and to write into the log."""

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Client, Running, running
from tests.scripted import in_engine, scripted
from tests.test_main import serving

ELSEWHERE = ("127.0.0.2", 0)  # another address of this machine
SECRET = "a secret nobody else may read, and long enough to fill some blocks of the cache"
HOSTILE = "x\r\nERROR wsserver: forged\x1b[2J\x00\u2028\u202e\x85"


async def with_key(server: Running, client: Client, key: str | None) -> None:
    """Let a connection count as one that has shown a key."""
    session = (await client.settle())["connection"]["session"]
    (peer,) = [found.peer for found in server.server._connections if found.peer.session.id == session]
    peer.session.key = key


# Ids.


async def test_the_same_id_of_two_clients_is_two_generations_and_a_cancel_stops_ones_own() -> None:
    async with scripted() as (server, model), server.client() as client, server.client() as other:
        await client.send(type="generate", id="g", prompt="mine")
        await other.send(type="generate", id="g", prompt="theirs")
        await in_engine(server, 2)
        await client.send(type="cancel", id="g")
        await client.settle()
        model.open()
        assert (await client.done("g"))["finish_reason"] == "cancelled"
        assert (await other.done("g"))["finish_reason"] == "stop"
        assert other.checker.texts == {"g": "theirs"}


async def test_a_cancel_of_somebody_elses_id_finds_as_little_as_one_of_nobodys() -> None:
    async with scripted() as (server, model), server.client() as client, server.client() as other:
        await client.send(type="generate", id="theirs", prompt="hello")
        await model.in_step(1)
        for id in ("theirs", "nobodys"):
            await other.send(type="cancel", id=id)
        answers = [await other.until("error"), await other.until("error")]
        assert len({str(answer).replace(answer["id"], "").replace('"', "'") for answer in answers}) == 1
        await other.send(type="cancel")
        assert (await other.until("error"))["code"] == "not_active"
        model.open()
        assert (await client.done("theirs"))["finish_reason"] == "stop"


# Resuming.


@pytest.mark.parametrize(("begun_with", "taken_up_with"), [("a", "b"), ("a", None), (None, "a")])
async def test_with_another_key_a_generation_cannot_be_taken_up_though_its_token_is_known(
    begun_with: str | None, taken_up_with: str | None
) -> None:
    async with scripted() as (server, model), server.client() as client, server.client() as thief:
        await with_key(server, client, begun_with)
        await with_key(server, thief, taken_up_with)
        await client.send(type="generate", id="g", prompt=SECRET, resumable=True)
        model.step_gate.let(2)
        started = await client.until("started")
        await client.until("token")
        await thief.resume(client, "g")
        expired = await thief.until("error")
        await thief.resume(client, "g", resume_token="wrong")
        assert (expired, expired["code"]) == (await thief.until("error"), "resume_expired")
        model.open()
        assert (await client.done("g"))["finish_reason"] == "stop"
        assert client.checker.texts == {"g": SECRET}
        async with server.client() as owner:
            await with_key(server, owner, begun_with)
            await owner.send(type="resume", id="g", resume_token=started["resume_token"])
            await owner.done("g")
            assert owner.checker.texts == {"g": SECRET}


async def test_without_keys_a_client_whose_address_has_changed_may_resume() -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="hello", resumable=True)
        model.open()
        await client.until("started")
        async with server.client(local_addr=ELSEWHERE) as elsewhere:
            await elsewhere.resume(client, "g", after_seq=0)
            await elsewhere.done("g")
            assert elsewhere.checker.texts == {"g": "hello"}


# What is told.


async def test_no_answer_to_whatever_a_client_asks_holds_anything_of_another() -> None:
    async with scripted(max_requests_per_key=2) as (server, model), server.client() as client:
        await client.send(type="generate", id="their-id", prompt=SECRET, resumable=True)
        model.step_gate.let(2)
        token = (await client.until("started"))["resume_token"]
        session = (await client.settle())["connection"]["session"]
        async with server.client() as other:
            asked: list[dict[str, Any]] = [
                {"type": "status"},
                {"type": "init", "id": "i"},
                {"type": "init", "id": "n", "model": "no/such"},
                {"type": "generate", "id": "a", "prompt": "x" * 100, "max_tokens": 10**6},
                {"type": "generate", "id": "b", "prompt": "x"},
                {"type": "generate", "id": "c", "prompt": "x"},
                {"type": "cancel", "id": "c"},
                {"type": "status"},
            ]
            for message in asked:
                await other.send(**message)
            model.open()
            for id in "abc":
                await other.done(id)
            await other.settle()
            told = str(other.frames)
            assert not [word for word in ("their-id", SECRET[:9], token, session) if word in told]


# The prefix cache.


async def cached(server: Running, client: Client, key: str | None) -> int:
    """Give how much of the secret prompt is found in the KV cache."""
    await with_key(server, client, key)
    tokens: int = (await client.generate(prompt=SECRET))["usage"]["cached_tokens"]
    return tokens


@pytest.mark.parametrize("shared", [True, False])
async def test_what_a_prompt_left_in_the_cache_is_found_with_its_own_key_and_with_others_only_if_shared(
    shared: bool,
) -> None:
    async with running(share_prefixes=shared) as server, server.client() as client:
        finds = [await cached(server, client, key) for key in ("a", "b", None, "a", "b", None)]
        assert [bool(tokens) for tokens in finds] == [False, shared, shared, True, True, True]
        async with server.client(local_addr=ELSEWHERE) as elsewhere:
            assert bool(await cached(server, elsewhere, None)) is shared
            assert await cached(server, elsewhere, "a") > 0


# The log.


@pytest.mark.parametrize("wanted", [False, True])
async def test_prompts_and_answers_are_logged_only_where_the_operator_wants_it_and_escaped(
    caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("websockets").setLevel(logging.WARNING)  # as the command line does
    async with running(log_content=wanted) as server, server.client() as client:
        await client.generate(id=HOSTILE[:9], prompt=SECRET + "\n")
        await client.generate(messages=[{"role": "user", "content": SECRET}])
    told = [record.getMessage() for record in caplog.records if record.name.startswith(("wsserver", "handlers", "LLM"))]
    assert any(SECRET in line for line in told) is wanted
    assert not any("\n" in line for line in told)
    if wanted:
        answered = re.findall(r"is answered '(.*?)'$", "\n".join(told), re.MULTILINE)
        assert "".join(answered) == SECRET + r"\n" + SECRET


def hostile_messages() -> list[dict[str, Any]]:
    """Give messages with what could forge a line of a log in every field that takes a string."""
    kinds: list[dict[str, Any]] = [
        {"type": "generate", "prompt": "a"},
        {"type": "init"},
        {"type": "cancel"},
        {"type": "resume", "id": "g", "resume_token": "t"},
        {"type": "status"},
    ]
    fields = ("id", "model", "device", "dtype", "quantization", "prompt", "stop", "token", "resume_token", "type", "role")
    return [{**kind, field: HOSTILE} for kind, field in itertools.product(kinds, fields)]


async def test_no_line_of_the_log_is_a_clients(tmp_path: Path) -> None:
    async with serving(tmp_path, "--log-level", "debug", "--log-content", "on") as process, process.client() as client:
        for number, message in enumerate(hostile_messages()):
            await client.socket.send(json.dumps(message))
            if number % 20 == 19:
                await client.socket.send(json.dumps({"type": "cancel"}))
        await client.socket.send(json.dumps({"type": "status"}))
        while '"status"' not in str(await client.socket.recv()):
            pass
        process.signal()
        await process.ends()
    lines = process.stderr.splitlines()
    assert any("forged" in line for line in lines), "the prompt is there, escaped"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO) [\w.]+: ", line) for line in lines), lines
    assert all(line.isprintable() for line in lines)
