"""Each limit of messages and frames over real sockets, at it and over it: whoever is not over it is served."""

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode

from tests.conftest import eventually, running
from tests.scripted import closing_code, scripted
from tests.test_client_limits import ELSEWHERE, refused
from wsserver.accepted import LONG_PIECE, PIECE, Accepted
from wsserver.reading import FRAMES_PER_TURN


def frame(opcode: Opcode, data: bytes, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin=fin).serialize(mask=True)


async def test_messages_over_the_rate_get_an_error_or_their_done_and_a_cancel_is_taken() -> None:
    async with scripted(messages_per_second=0.5) as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="hello")
        await model.in_step(1)
        for _ in range(4):
            await client.settle()
        await client.send(type="status")
        error = await client.until("error")
        assert (error["code"], 0 < error["retry_after_ms"] <= 2000) == ("rate_limited", True)
        await client.send(type="generate", id="late", prompt="hello")
        done = await client.done("late")
        assert (done["error"]["code"], 0 < done["error"]["retry_after_ms"] <= 2000) == ("rate_limited", True)
        await client.send(type="generate", id="g", prompt="hello")
        assert (await client.until("error"))["code"] == "rate_limited"
        await client.send(type="cancel", id="g")
        await client.send(type="status")
        assert (await client.until("error"))["code"] == "rate_limited"  # and so the cancel was read
        model.open()
        assert (await client.done("g"))["finish_reason"] == "cancelled"


async def test_who_does_not_slow_down_is_closed_and_another_connection_is_served() -> None:
    async with running(messages_per_second=0.1) as server, server.client() as client, server.client() as other:
        for _ in range(40):
            await client.send(type="status")
        assert await closing_code(client) == 4429
        assert [frame["type"] for frame in client.frames] == ["status", *["error"] * 32]
        assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_all_connections_of_one_client_are_read_no_faster_than_it_may_send() -> None:
    # 40 frames a second and 400 at once on all its connections; each of them has a bound of its own, which none reaches.
    pings, rate, at_once, in_a_piece = 110, 40.0, 400, PIECE // 125
    async with running(messages_per_second=1) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.client()) for _ in range(4)]
        began = asyncio.get_running_loop().time()
        for number in range(pings):
            pongs = [await client.socket.ping(f"{number:0125}") for client in clients]
        await asyncio.gather(*pongs)
        took = asyncio.get_running_loop().time() - began
        # One piece of each connection may be parsed before it rests.
        assert took >= (len(clients) * (pings - in_a_piece) - at_once) / rate
        async with server.client(local_addr=ELSEWHERE) as other:
            assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_a_flood_of_cancels_is_closed_too() -> None:
    async with running(messages_per_second=0.1) as server, server.client() as client:
        for number in range(40):
            await client.send(type="cancel", id=f"somebody's {number}")
        assert await closing_code(client) == 4429


async def test_a_new_connection_does_not_let_a_client_say_more_than_ten_may() -> None:
    async with running(messages_per_second=0.1) as server:
        for _ in range(10):
            async with server.client() as client:
                await client.settle()
        async with server.client() as client, server.client(local_addr=ELSEWHERE) as other:
            await client.send(type="status")
            error = await client.until("error")
            assert (error["code"], 0 < error["retry_after_ms"] <= 1000) == ("rate_limited", True)
            await other.settle()


async def test_a_long_message_counts_for_several() -> None:
    async with running(messages_per_second=0.5) as server, server.client() as client:
        await client.send(type="status", unknown="x" * 5 * 4096)
        await client.until("status")
        await client.send(type="status")
        assert (await client.until("error"))["code"] == "rate_limited"


@pytest.mark.parametrize(
    "wire",
    [
        frame(Opcode.PING, b"x" * 125),
        frame(Opcode.PONG, b""),
        frame(Opcode.CONT, b"", fin=False),
    ],
    ids=["pings", "pongs", "pieces"],
)
async def test_a_flood_of_frames_is_closed_and_another_connection_is_served(wire: bytes) -> None:
    async with running(messages_per_second=1.0) as server, server.client() as client, server.client() as other:
        client.checker.sent({"type": "status"})
        client.socket.transport.write(frame(Opcode.TEXT, b'{"type":"status"', fin=False))
        client.socket.transport.write(wire * 100)
        client.socket.transport.write(frame(Opcode.CONT, b"}"))
        await client.until("status")
        client.socket.transport.write(frame(Opcode.TEXT, b" ", fin=False) + wire * 5000)
        assert await closing_code(client) == 4429
        assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_an_address_that_floods_is_let_in_no_more_for_a_while_and_who_is_in_stays() -> None:
    async with running(messages_per_second=0.1) as server, server.client() as neighbour:
        async with server.client() as client:
            client.socket.transport.write(200 * frame(Opcode.PING, b""))
            assert await closing_code(client) == 4429
        assert await refused(server) == 429
        assert (await neighbour.generate(prompt="hello"))["joined"] == "hello"
        async with server.client(local_addr=ELSEWHERE) as other:
            assert (await other.generate(prompt="hello"))["joined"] == "hello"


async def test_many_frames_that_came_at_once_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, turns, parsed = asyncio.get_running_loop(), itertools.count(), Counter[int]()

    def parse(self: Accepted, event: Any, by: Callable[[Any, Any], None] = Accepted.process_event) -> None:
        parsed[turn[0]] += 1
        by(self, event)

    def pass_on() -> None:
        turn[0] = next(turns)
        passing[0] = loop.call_soon(pass_on)

    turn, passing = [0], [loop.call_soon(lambda: None)]
    pass_on()
    monkeypatch.setattr(Accepted, "process_event", parse)
    async with running() as server, server.client() as client, server.client() as other:
        for flooding in (client, other):
            flooding.socket.transport.write(1500 * frame(Opcode.PING, b""))
        for flooding in (client, other):
            await flooding.settle()
    passing[0].cancel()
    assert sum(parsed.values()) > 3000
    assert max(parsed.values()) <= FRAMES_PER_TURN + PIECE // len(frame(Opcode.PING, b""))


async def test_a_long_frame_is_parsed_in_longer_pieces_and_what_follows_it_in_short_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces: list[int] = []

    def parse(self: Accepted, by: Callable[[Any], int] = Accepted.parse) -> int:
        before = len(self._unparsed)
        frames = by(self)
        if len(self._unparsed) < before:
            pieces.append(before - len(self._unparsed))
        return frames

    async with running() as server, server.client() as client:
        await client.settle()
        monkeypatch.setattr(Accepted, "parse", parse)
        message = json.dumps({"type": "status", "x": "y" * 100_000}).encode()
        client.socket.transport.write(frame(Opcode.TEXT, message) + 100 * frame(Opcode.PING, b"x" * 100))
        await client.settle()
    assert LONG_PIECE in pieces
    assert len(pieces) < 100_000 // LONG_PIECE + 10_600 // PIECE + 12
    assert sum(pieces) > 110_000
    assert max(pieces[-8:]) <= PIECE


async def test_who_waits_for_a_turn_is_read_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as server, server.client() as client:
        await client.settle()
        (connection,) = server.server._connections
        accepted = cast(Accepted, connection._socket)
        monkeypatch.setattr(server.server._reading, "_parse", lambda: None)
        client.socket.transport.write(10 * frame(Opcode.PING, b""))
        await eventually(lambda: bool(accepted._unparsed))
        assert not accepted.transport.is_reading()
        monkeypatch.undo()
        server.server._reading._parse()
        await client.settle()
        assert accepted.transport.is_reading()


async def test_who_was_cut_off_is_read_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bool] = []

    def reading(self: Accepted, data: bytes, read_by: Callable[[Any, bytes], None] = ServerConnection.data_received) -> None:
        read.append(self._is_cut_off)
        read_by(self, data)

    monkeypatch.setattr(ServerConnection, "data_received", reading)
    async with running(messages_per_second=1.0) as server, server.client() as client:
        for _ in range(100):
            client.socket.transport.write(1000 * frame(Opcode.PING, b""))
        assert await closing_code(client) == 4429
    assert read
    assert not any(read)


async def test_a_frame_that_says_it_is_compressed_is_no_frame() -> None:
    async with running() as server, server.client() as client:
        plain = frame(Opcode.TEXT, b"\x00" * 100)
        client.socket.transport.write(bytes([plain[0] | 0b100_0000]) + plain[1:])
        assert await closing_code(client) == 1002


async def test_the_bytes_and_the_depth_of_a_message_are_as_the_operator_says() -> None:
    async with running(max_message_bytes=100, max_json_depth=3) as server, server.client() as client:
        await client.send(type="init", id="i")
        assert (await client.until("ready"))["limits"]["max_message_bytes"] == 100
        await client.send_text('{"type":"status","x":[[1]]}'.ljust(100))
        await client.until("status")
        await client.send_text('{"x":[[[1]]]}')
        assert (await client.until("error"))["code"] == "bad_json"
        await client.send_text("{}".ljust(101))
        assert await closing_code(client) == 1009
