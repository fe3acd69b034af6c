"""Authentication at the socket: where a key may stand, what happens without one, and what a wrong one costs."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.conftest import Client, Running, eventually, running
from tests.scripted import closing_code, scripted
from tests.test_server import get
from wsserver.auth import Keys, digest

KEY = "sk-alice-9tZqX3vLw5YcR7uB2nM8eK4hJ6gF1dS0aP"
WRONG = "sk-mallory-9tZqX3vLw5YcR7uB2nM8eK4hJ6gF1dS"
BOB = "sk-bob-9tZqX3vLw5YcR7uB2nM8eK4hJ6gF1dS0aPq"
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def keys() -> Keys:
    return Keys({"alice": digest(KEY), "bob": digest(BOB)})


@pytest.fixture
async def locked() -> AsyncIterator[Running]:
    async with running(keys=keys(), max_auth_failures=1000) as server:
        yield server


def bearer(key: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {key}"}}


def offering(*names: str) -> dict[str, Any]:
    return {"subprotocols": list(names)}


def names(server: Running) -> list[str | None]:
    return [connection.peer.session.key for connection in server.server._connections]


async def said(client: Client) -> dict[str, Any]:
    """Give the next frame; what a stranger is answered breaks no rule of the checker's, which knows of no strangers."""
    async with asyncio.timeout(10):
        frame: dict[str, Any] = json.loads(await client.socket.recv(decode=True))
    return frame


async def code_of(client: Client) -> int:
    """Read on to the end of the connection, whatever comes; give the code it was closed with."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await said(client)
    assert client.socket.close_code
    return client.socket.close_code


# Where a key may stand.


@pytest.mark.parametrize(
    "options",
    [
        bearer(KEY),
        {"additional_headers": {"authorization": f"bearer   {KEY}"}},
        offering("llmstream.v1", f"llmstream.bearer.{KEY}"),
        offering(f"llmstream.bearer.{KEY}", "llmstream.v1"),
        bearer(KEY) | offering("llmstream.v1", f"llmstream.bearer.{KEY}"),
        {"additional_headers": [("Authorization", "Basic YTpi"), ("Authorization", f"Bearer {KEY}")]},
    ],
    ids=["header", "small letters", "subprotocol", "subprotocol first", "both", "beside a proxy's"],
)
async def test_who_shows_a_key_in_the_handshake_is_known_from_the_beginning(locked: Running, options: dict[str, Any]):
    async with locked.client(**options) as client:
        # The key that was offered is no name of a protocol, and is never given back.
        assert client.socket.subprotocol == ("llmstream.v1" if "subprotocols" in options else None)
        assert KEY not in str(client.socket.response.headers)
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        assert names(locked) == ["alice"]


async def test_a_key_alone_among_the_offers_is_taken_and_not_chosen(locked: Running):
    async with locked.client(**offering(f"llmstream.bearer.{KEY}")) as client:
        assert client.socket.subprotocol is None
        assert (await client.generate(prompt="hello"))["joined"] == "hello"


async def test_who_can_set_neither_sends_the_key_in_an_init(locked: Running):
    async with locked.client() as client:
        await client.send(type="init", id="i", token=KEY)
        await client.until("ready")
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        assert names(locked) == ["alice"]


async def test_once_known_a_client_stays_who_it_is_whatever_an_init_says(locked: Running):
    async with locked.client(**bearer(KEY)) as client:
        for token in (BOB, WRONG, ""):
            await client.send(type="init", id="i", token=token)
            await client.until("ready")
        assert names(locked) == ["alice"]


async def test_without_keys_nobody_looks_at_any(echo: Running):
    async with echo.client(**bearer(WRONG)) as client:
        await client.send(type="init", id="i", token=WRONG)
        await client.until("ready")
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        assert names(echo) == [None]


# A wrong one.


@pytest.mark.parametrize(
    "options",
    [
        bearer(WRONG),
        bearer(""),
        bearer(KEY[:-1]),
        bearer(KEY + "A"),
        bearer(f"{KEY} {KEY}"),
        offering("llmstream.v1", f"llmstream.bearer.{WRONG}"),
        offering("llmstream.v1", "llmstream.bearer."),
        # Two keys: nobody knows who that is.
        bearer(KEY) | offering("llmstream.v1", f"llmstream.bearer.{WRONG}"),
        bearer(KEY) | offering("llmstream.v1", f"llmstream.bearer.{BOB}"),
        {"additional_headers": [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {WRONG}")]},
    ],
)
async def test_a_wrong_key_in_the_handshake_is_refused_in_one_line(
    locked: Running, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
):
    caplog.set_level("DEBUG", "wsserver")
    with pytest.raises(InvalidStatus) as refused:
        async with locked.client(**options):
            pass
    response = refused.value.response
    assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert re.fullmatch(rb"[^\n]*key[^\n]*\n", response.body)
    assert not re.search("sk-", caplog.text + response.body.decode())


async def test_a_wrong_key_in_an_init_is_answered_and_ends_the_connection(locked: Running, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG", "wsserver")
    async with locked.client() as client:
        await client.send(type="init", id="i", model="nobody/knows", token=WRONG)
        error = await client.until("error")
        assert (error["code"], error["id"]) == ("unauthenticated", "i")
        assert WRONG not in error["message"]
        assert await closing_code(client) == 4401
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["127.0.0.1: a wrong key"]
    assert WRONG not in caplog.text


async def test_what_follows_a_wrong_key_is_not_served(locked: Running):
    async with locked.client() as client:
        for message in ({"type": "init", "token": WRONG}, {"type": "init", "token": KEY}, {"type": "status"}):
            await client.socket.send(json.dumps(message))
        assert (await said(client))["code"] == "unauthenticated"
        assert await code_of(client) == 4401


async def test_a_list_of_subprotocols_that_is_none_is_refused_without_repeating_it(locked: Running):
    offer = f"Sec-WebSocket-Protocol: llmstream.bearer.{KEY};;\r\n"
    status, answer = await get(locked, "/ws", UPGRADE + offer)
    assert status == 400
    assert KEY not in answer


# Without one.


STRANGERS_WORDS = [
    ({"type": "status"}, None),
    ({"type": "cancel"}, None),
    ({"type": "cancel", "id": "c"}, "c"),
    ({"type": "init", "id": "i"}, "i"),
    ({"type": "init", "id": "i", "model": "nobody/knows"}, "i"),
    ({"type": "init", "id": "i", "token": None}, "i"),
    ({"type": "resume", "id": "r", "resume_token": "x"}, "r"),
]


@pytest.mark.parametrize(("message", "id"), STRANGERS_WORDS)
async def test_a_stranger_may_say_nothing_but_who_it_is_and_may_say_it_then(
    locked: Running, message: dict[str, Any], id: str | None
):
    async with locked.client() as client:
        await client.socket.send(json.dumps(message))
        error = await said(client)
        assert (error["type"], error["code"], error.get("id")) == ("error", "unauthenticated", id)
        await client.send(type="init", id="mine", token=KEY)
        assert (await client.until("ready"))["id"] == "mine"
        assert (await client.settle())["connection"]["active"] == []


async def test_a_stranger_s_generate_gets_its_one_done_and_no_step_is_made_for_it():
    async with scripted(keys=keys()) as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="hello")
        done = await client.until("done")
        assert (done["id"], done["error"]["code"]) == ("g", "unauthenticated")
        await client.send(type="generate", prompt="hello")
        assert (await client.until("done"))["error"]["code"] == "unauthenticated"
        assert not model.steps
        model.open()
        await client.send(type="init", token=KEY)
        assert (await client.generate(id="g", prompt="hello"))["joined"] == "hello"


async def test_a_stranger_who_goes_on_talking_is_closed(locked: Running):
    async with locked.client() as client:
        for _ in range(33):
            await client.socket.send('{"type":"status"}')
        for _ in range(32):
            assert (await said(client))["code"] == "unauthenticated"
        assert await code_of(client) == 4400


async def test_who_shows_no_key_in_time_is_closed_and_who_does_is_not():
    async with running(keys=keys(), auth_timeout=0.2) as server, server.client(**bearer(KEY)) as known:
        async with server.client() as late, server.client() as early:
            await early.send(type="init", id="i", token=KEY)
            await early.until("ready")
            assert await closing_code(late) == 4408
            assert (await early.generate(prompt="hello"))["joined"] == "hello"
        assert (await known.generate(prompt="hello"))["joined"] == "hello"


async def test_talking_does_not_put_off_the_end_of_the_time():
    async with running(keys=keys(), auth_timeout=0.2) as server, server.client() as client:
        await client.socket.ping()
        await client.socket.send('{"type":"status"}')
        assert (await said(client))["code"] == "unauthenticated"
        assert await code_of(client) == 4408


async def test_nothing_waits_for_the_key_of_who_has_gone():
    async with running(keys=keys(), auth_timeout=0.2) as server:
        async with server.client():
            await eventually(lambda: len(server.server._connections) == 1)
            (gone,) = server.server._connections
        async with server.client() as later:
            assert await closing_code(later) == 4408
        assert gone._closer is None


async def test_a_stranger_learns_no_model_whatever_it_asks_for():
    async with scripted(loaded=False, keys=keys(), echo_path=True) as (server, model):
        learnt = [await get(server, path) for path in ("/healthz", "/readyz", "/", "/ws", "/echo", "/nothing")]
        model.load_gate.shut()
        async with server.client(**bearer(KEY)) as known, server.client() as stranger:
            await known.send(type="generate", id="g", prompt="hello")
            await known.until("queued")
            learnt.append(await get(server, "/readyz"))
            words = [message for message, _ in STRANGERS_WORDS]
            words += [
                {"type": "generate", "prompt": "x"},
                {"type": "generate", "model": "wsserver/echo"},
                {"type": "models"},
            ]
            for message in words:
                await stranger.socket.send(json.dumps(message))
                learnt.append((0, json.dumps(await said(stranger))))
            model.open()
            await known.done("g")
        told = "\n".join(text for _, text in learnt).replace("nobody/knows", "")
        assert "the default model is not loaded yet" in told
        assert "the default model is loading" in told
        assert "wsserver/echo" not in told


# Plain HTTP.


@pytest.mark.parametrize(
    ("path", "without", "wrong", "right"),
    [
        ("/healthz", 200, 200, 200),
        ("/readyz", 503, 503, 503),  # no model is loaded here
        ("/", 200, 401, 200),
        ("/app.js", 200, 401, 200),
        ("/nothing", 401, 401, 404),
        ("/ws", 426, 401, 426),
        ("/echo", 401, 401, 426),
    ],
)
@pytest.mark.parametrize("open_http", [False, True])
async def test_plain_http_asks_for_a_key_too_unless_told_otherwise(
    path: str, without: int, wrong: int, right: int, open_http: bool
):
    async with running(keys=keys(), open_http=open_http, echo_path=True) as server:
        opened = open_http and path not in ("/echo", "/ws")
        assert (await get(server, path))[0] == (right if opened else without)
        assert (await get(server, path, f"Authorization: Bearer {WRONG}\r\n"))[0] == wrong
        assert (await get(server, path, f"Authorization: Bearer {KEY}\r\n"))[0] == right


async def test_the_echo_path_has_no_init_and_asks_for_a_key_in_the_handshake():
    async with running(keys=keys(), echo_path=True, open_http=True) as server:
        url = server.url.replace("/ws", "/echo")
        with pytest.raises(InvalidStatus, match="401"):
            await connect(url)
        async with connect(url, **bearer(KEY)) as socket:
            await socket.send("hello")
            assert await socket.recv() == "hello"


# Too many wrong ones.


async def test_an_address_that_sends_too_many_wrong_keys_is_refused_for_a_while_in_every_way(
    monkeypatch: pytest.MonkeyPatch,
):
    async with running(keys=keys(), max_auth_failures=3) as server, server.client(**bearer(KEY)) as known:
        now = 1000.0
        monkeypatch.setattr(server.server._door, "_clock", lambda: now)
        async with server.client() as stranger:
            await stranger.send(type="init", token=WRONG)
            assert await closing_code(stranger) == 4401
        for options in (bearer(WRONG), offering(f"llmstream.bearer.{WRONG}")):
            with pytest.raises(InvalidStatus, match="401"):
                await connect(server.url, **options)
        for options in (bearer(WRONG), bearer(KEY), {}):
            with pytest.raises(InvalidStatus) as refused:
                await connect(server.url, **options)
            response = refused.value.response
            assert (response.status_code, response.headers["Retry-After"]) == (429, "61")
            assert response.body.count(b"\n") == 1
        assert (await get(server, "/"))[0] == 429
        assert (await get(server, "/healthz"))[0] == 200
        # Who is in stays in.
        assert (await known.generate(prompt="hello"))["joined"] == "hello"
        now += 60
        async with server.client(**bearer(KEY)) as client:
            assert (await client.generate(prompt="hello"))["joined"] == "hello"


async def test_who_has_no_key_yet_costs_nobody_a_try():
    async with running(keys=keys(), max_auth_failures=1) as server:
        for _ in range(3):
            async with server.client() as client:
                await client.socket.send('{"type":"status"}')
                assert (await said(client))["code"] == "unauthenticated"
            assert (await get(server, "/nothing"))[0] == 401
        async with server.client(**bearer(KEY)):
            pass


class Counting(Keys):
    """Keys that count how often one is compared."""

    compared = 0

    def whose(self, key: str) -> str | None:
        self.compared += 1
        return super().whose(key)


async def test_a_hundred_open_connections_have_no_more_guesses_than_one():
    counting = Counting({"alice": digest(KEY)})
    async with running(keys=counting, max_auth_failures=10) as server, contextlib.AsyncExitStack() as stack:
        strangers = [await stack.enter_async_context(server.client()) for _ in range(100)]
        for number, stranger in enumerate(strangers):
            await stranger.socket.send(json.dumps({"type": "init", "id": "i", "token": f"{WRONG}{number}"}))
        answers = [await said(stranger) for stranger in strangers]
        codes = [await code_of(stranger) for stranger in strangers]
        assert counting.compared == 10
        assert sorted(codes) == [4401] * 10 + [4429] * 90
        refused = [answer for answer in answers if answer["code"] == "rate_limited"]
        assert len(refused) == 90
        assert all(0 < answer["retry_after_ms"] <= 60_000 and answer["id"] == "i" for answer in refused)


async def test_a_guess_is_refused_before_it_is_compared_in_every_way_it_can_be_shown():
    counting = Counting({"alice": digest(KEY)})
    async with running(keys=counting, max_auth_failures=3) as server, server.client() as early:
        for options in (bearer(WRONG), offering(f"llmstream.bearer.{WRONG}"), bearer(WRONG)):
            with pytest.raises(InvalidStatus, match="401"):
                await connect(server.url, **options)
        for options in (bearer(KEY), offering(f"llmstream.bearer.{KEY}")):
            with pytest.raises(InvalidStatus, match="429"):
                await connect(server.url, **options)
        assert (await get(server, "/", f"Authorization: Bearer {KEY}\r\n"))[0] == 429
        # The right key too: that it is the right one is what a guess would find out.
        await early.send(type="init", id="i", token=KEY)
        assert (await said(early))["code"] == "rate_limited"
        assert await code_of(early) == 4429
        assert counting.compared == 3
