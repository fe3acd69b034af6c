"""When a client dials again, and when it gives up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from tests.conftest import Running
from wsserver.client import dialing
from wsserver.client.dialing import FIRST_DELAY, LONGEST_DELAY, Backoff, Dialer
from wsserver.client.messages import ConnectionLost, ServerError


def longest(low: float, high: float) -> float:
    assert low == 0
    return high


def test_each_wait_is_twice_the_last_one_up_to_the_longest_and_an_answer_begins_anew() -> None:
    backoff = Backoff(1e9, draw=longest)
    waits = [backoff.wait(0.0) for _ in range(9)]
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    backoff.answered()
    assert backoff.wait(0.0) == FIRST_DELAY


@given(st.floats(0, 300), st.lists(st.floats(0, 50), max_size=30))
def test_it_gives_up_once_its_patience_is_over_and_never_before_a_first_try(patience: float, passing: list[float]) -> None:
    backoff, now = Backoff(patience), 1000.0
    assert backoff.wait(now) is not None
    for seconds in passing:
        now += seconds
        wait = backoff.wait(now)
        assert (wait is None) == (now - 1000.0 >= patience)
        assert wait is None or 0 <= wait <= LONGEST_DELAY
    backoff.answered()
    assert backoff.wait(now) is not None


@contextlib.asynccontextmanager
async def closing_with(code: int, reason: str = "so") -> AsyncIterator[str]:
    """Serve whoever comes with a close of that code."""

    async def close(client: ServerConnection) -> None:
        await client.close(code, reason)

    async with serve(close, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws"


@contextlib.asynccontextmanager
async def answering(status: int, text: str) -> AsyncIterator[tuple[str, list[Request]]]:
    """Refuse whoever comes with a status; give the address, and the requests there were."""
    requests: list[Request] = []

    def refuse(client: ServerConnection, request: Request) -> Response:
        requests.append(request)
        return client.respond(status, text)

    async def never(client: ServerConnection) -> None:
        raise AssertionError

    async with serve(never, "127.0.0.1", 0, process_request=refuse) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws", requests


@pytest.mark.parametrize(("code", "name"), [(4401, "unauthenticated"), (4403, "forbidden")])
async def test_a_close_that_is_an_error_by_name_is_raised_as_that(code: int, name: str) -> None:
    async with closing_with(code, "the key is wrong") as url:
        dialer = Dialer(url, None, 60.0)
        socket = await dialer.dial()
        await socket.wait_closed()
        with pytest.raises(ServerError, match="the key is wrong") as raised:
            await dialer.redial(socket)
        assert raised.value.code == name


@pytest.mark.parametrize("code", [1000, 1003, 1007, 1009, 4400])
async def test_after_a_close_for_good_nobody_is_dialed(code: int) -> None:
    async with closing_with(code) as url:
        dialer = Dialer(url, None, 60.0)
        socket = await dialer.dial()
        await socket.wait_closed()
        with pytest.raises(ConnectionLost, match=f"closed the connection with {code} \\(so\\)") as raised:
            await dialer.redial(socket)
        assert raised.value.code == code


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013, 4408, 4413, 4429])
async def test_after_any_other_close_it_is_dialed_anew(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(dialing, "RATE_DELAY", 0.0)
    async with closing_with(code) as url:
        dialer = Dialer(url, None, 60.0)
        socket = await dialer.dial()
        await socket.wait_closed()
        again = await dialer.redial(socket)
        assert again is not socket
        await again.wait_closed()


async def test_who_comes_too_often_waits_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "FIRST_DELAY", 0.0)
    passed: list[float] = []

    async def pass_by(seconds: float) -> None:
        passed.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(dialing, "_pass", pass_by)
    async with closing_with(4429) as url:
        dialer = Dialer(url, None, 60.0)
        socket = await dialer.dial()
        await socket.wait_closed()
        await (await dialer.redial(socket)).wait_closed()
        assert passed[0] == 60


@pytest.mark.parametrize(("status", "name"), [(401, "unauthenticated"), (403, "forbidden")])
async def test_a_handshake_that_is_refused_says_why(status: int, name: str) -> None:
    async with answering(status, "this key is unknown\n") as (url, requests):
        with pytest.raises(ServerError, match=f"{name}: this key is unknown"):
            await Dialer(url, "sk-1", 60.0).dial()
        assert requests[0].headers["Authorization"] == "Bearer sk-1"


async def test_without_a_key_none_is_sent() -> None:
    async with answering(401, "") as (url, requests):
        with pytest.raises(ServerError, match="the server answered 401"):
            await Dialer(url, None, 60.0).dial()
        assert "Authorization" not in requests[0].headers


async def test_a_server_of_something_else_is_no_connection() -> None:
    async with answering(404, "nothing here") as (url, _):
        with pytest.raises(ConnectionLost, match="answers 404: nothing here"):
            await Dialer(url, None, 60.0).dial()
    with pytest.raises(ConnectionLost, match="isn't a valid URI"):
        await Dialer("localhost:41443", None, 60.0).dial()


async def test_when_nobody_comes_back_it_is_told_why() -> None:
    async with closing_with(1012) as url:
        dialer = Dialer(url, None, 0.0)
        socket = await dialer.dial()
        await socket.wait_closed()
    with pytest.raises(ConnectionLost, match=r"does not come back: .*Connect call failed") as raised:
        await dialer.redial(socket)
    assert raised.value.code == 1012


async def test_the_client_says_who_it_is_and_what_it_speaks(echo: Running) -> None:
    socket = await Dialer(echo.url, None, 60.0).dial()
    assert socket.subprotocol == "llmstream.v1"
    await socket.close()
