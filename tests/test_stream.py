"""The mailbox between the engine's post and its reader; what the engine puts into it is tested with the engine's thread."""

import asyncio
import contextlib
from typing import Any

import pytest

from LLM.engine.request import Delta, Finished, GenerationRequest, Part, Prefill, Queued, Scored, Started, Timings
from LLM.engine.stream import GenerationStream

END = Finished("stop", 1, Timings(1.0))


def stream_of(*parts: Part) -> GenerationStream:
    stream = GenerationStream(GenerationRequest("k", (1,), 9), lambda stream: None, lambda stream: None)
    for part in parts:
        stream.put(part)
    return stream


def told(*token_ids: int) -> tuple[tuple[Scored, ...], ...]:
    return tuple((Scored(token_id, "x", -0.5), Scored(1, None, -0.25)) for token_id in token_ids)


@pytest.mark.parametrize(
    ("put", "read"),
    [
        ([Delta("a", 1), Delta("", 2), Delta("b", 3)], [Delta("ab", 6)]),
        ([Delta("a", 1, told(4)), Delta("bc", 2, told(5, 6))], [Delta("abc", 3, told(4, 5, 6))]),
        ([Queued(3), Queued(2), Started(9), Prefill(1, 9), Prefill(2, 9)], [Queued(2), Started(9), Prefill(2, 9)]),
        ([Queued(1), Prefill(1, 9), Delta("a", 1), Prefill(2, 9), Delta("b", 1)],) * 2,
        ([Queued(1), Started(9), Queued(2)],) * 2,
    ],
)
async def test_a_part_joins_the_unread_one_of_its_kind_before_it_and_passes_no_other(
    put: list[Part], read: list[Part]
) -> None:
    assert [part async for part in stream_of(*put, END)] == [*read, END]


async def test_joining_leaves_the_parts_that_were_put_as_they_were() -> None:
    first, second = Delta("a", 1, told(4)), Delta("b", 1, told(5))
    stream_of(first, second)
    assert (first, second) == (Delta("a", 1, told(4)), Delta("b", 1, told(5)))


async def test_what_was_read_is_not_joined_with() -> None:
    stream = stream_of(Delta("a", 1, told(4)))
    assert await anext(stream) == Delta("a", 1, told(4))
    stream.put(Delta("b", 1, told(5)))
    assert await anext(stream) == Delta("b", 1, told(5))


async def test_a_reader_that_is_early_waits_and_after_the_end_there_is_nothing() -> None:
    stream = stream_of()
    reader = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    assert not reader.done()
    stream.put(Started(9))
    assert await reader == Started(9)
    stream.put(END)
    assert [part async for part in stream] == [END]
    assert [part async for part in stream] == []


async def test_it_knows_what_came_so_far_read_or_not() -> None:
    stream = stream_of(Queued(1))
    assert (stream.started, stream.completion_tokens) == (False, 0)
    for part in (Started(9), Delta("a", 2), Delta("b", 3)):
        stream.put(part)
    assert (stream.started, stream.completion_tokens) == (True, 5)


@pytest.mark.parametrize("error", [None, ValueError()])
async def test_it_is_entered_and_left_whatever_happens_between(error: Exception | None) -> None:
    seen: list[Any] = []
    stream = GenerationStream(
        GenerationRequest("k", (1,), 9),
        lambda stream: seen.append(("in", stream)),
        lambda stream: seen.append(("out", stream)),
    )
    with contextlib.suppress(ValueError):
        async with stream as entered:
            assert entered is stream
            assert seen == [("in", stream)]
            if error:
                raise error
    assert seen == [("in", stream), ("out", stream)]
