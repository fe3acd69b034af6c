"""The engine's border: every opened stream has exactly one end, whatever happens on the thread behind it."""

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from LLM._base_model_handler import LoadedModel, LoadOptions
from LLM.engine import answer as answer_module
from LLM.engine import thread as thread_module
from LLM.engine import worker as worker_module
from LLM.engine.request import Delta, Finished, GenerationRequest, Part, Prefill, Queued, Sampled, Started, Timings
from LLM.engine.sequence import Slice
from LLM.engine.stream import GenerationStream
from LLM.engine.thread import GenerationEngine
from LLM.engine.worker import EngineSettings
from LLM.model_srv_wsserver_echo import END, ModelHandler
from tests.conftest import eventually
from tests.scripted import ScriptedModel

Engine = GenerationEngine
ORDER = [Queued, Started, Prefill, Delta, Finished]


def load(model: ModelHandler) -> LoadedModel:
    return model.load(Path(), LoadOptions(), lambda stage, progress: None)


TOKENIZER = load(ModelHandler()).tokenizer


def request(id: str, text: str = "hello", max_tokens: int = 5000, **details: object) -> GenerationRequest:
    ids = tuple(TOKENIZER.encode(text).ids)
    return GenerationRequest(("session", id), ids, max_tokens, end_token_ids=frozenset({END}), **details)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def started(model: ScriptedModel | None = None, capacity: int = 4) -> AsyncIterator[tuple[Engine, ScriptedModel]]:
    model, engine = model or ScriptedModel(), Engine(EngineSettings(capacity))
    await engine.start(lambda: load(model))
    try:
        yield engine, model
    finally:
        model.open()
        await engine.close()


async def parts_of(engine: Engine, of: GenerationRequest, heard: list[Part] | None = None) -> list[Part]:
    heard = [] if heard is None else heard
    async with engine.open(of) as stream:
        async for part in stream:
            heard.append(part)
    return heard


async def reading(engine: Engine, *requests: GenerationRequest) -> "list[asyncio.Task[list[Part]]]":
    """Begin to read; when this returns, the requests are in the engine's inbox."""
    tasks = [asyncio.create_task(parts_of(engine, r)) for r in requests]
    await asyncio.sleep(0)
    return tasks


def end(parts: list[Part]) -> Finished:
    """The one end, after which there is nothing."""
    ends = [part for part in parts if isinstance(part, Finished)]
    assert len(ends) == 1
    assert parts[-1] is ends[0]
    return ends[0]


def text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Delta))


async def ends_of(tasks: "list[asyncio.Task[list[Part]]]") -> list[tuple[str, str | None]]:
    async with asyncio.timeout(20):  # a stream without an end would be waited for for ever
        ends = [end(parts) for parts in await asyncio.gather(*tasks)]
    return [(e.reason, e.error and e.error[0]) for e in ends]


# Ends that a request comes to by itself.


@pytest.mark.parametrize(
    ("details", "reason", "shown", "tokens"),
    [({}, "stop", "hello", 6), ({"max_tokens": 3}, "length", "hel", 3), ({"stop": ("lo",)}, "stop", "hel", 5)],
)
async def test_an_answer_comes_whole_and_in_order(details: dict, reason: str, shown: str, tokens: int):
    async with started() as (engine, model):
        model.open()
        parts = await parts_of(engine, request("a", **details))
        assert parts[0] == Started(5)
        assert all(isinstance(part, Delta) for part in parts[1:-1])
        assert (end(parts).reason, text(parts), end(parts).completion_tokens) == (reason, shown, tokens)
        times = end(parts).timings
        assert 0 <= times.started <= times.first_token <= times.total
        assert model.held() == set()


async def test_requests_start_in_the_order_they_came_and_are_told_each_move_in_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "POSITIONS_INTERVAL", 0)
    async with started(capacity=1) as (engine, model):
        heard: dict[str, list[Part]] = {id: [] for id in "abcd"}
        tasks = [asyncio.create_task(parts_of(engine, request(id), heard[id])) for id in heard]
        await model.in_step(1)
        model.step_gate.let(1)
        await eventually(lambda: [heard[id] for id in "bcd"] == [[Queued(1)], [Queued(2)], [Queued(3)]])
        assert (engine.active, engine.queued) == (1, 3)
        model.open()
        await asyncio.gather(*tasks)
        assert [batch[0].sequence.request.key[1] for batch in model.steps if batch[0].begins] == list("abcd")
        b, c, d = ([part.position for part in heard[id] if isinstance(part, Queued)] for id in "bcd")
        # Moves that were not read in time merge into the newest.
        assert (b, c) == ([1], [2, 1])
        assert d in ([3, 2, 1], [3, 1])
        assert (engine.active, engine.queued) == (0, 0)


# Cancels.


@pytest.mark.parametrize("cancels", [1, 2])
@pytest.mark.parametrize(("prompt", "steps_before"), [("hello", 3), ("x" * 1000, 1), ("x" * 1000, 3)])
async def test_a_cancel_ends_decode_and_prefill_after_the_step_that_runs(prompt: str, steps_before: int, cancels: int):
    async with started() as (engine, model):
        tasks = await reading(engine, request("a", prompt))
        model.step_gate.let(steps_before - 1)
        await model.in_step(steps_before)
        for _ in range(cancels):
            engine.cancel(("session", "a"))
        model.open()
        assert await ends_of(tasks) == [("cancelled", None)]
        assert len(model.steps) == steps_before
        assert model.freed == [("session", "a")]
        assert await ends_of(await reading(engine, request("a"))) == [("stop", None)]


@pytest.mark.parametrize("seen", [True, False], ids=["in line", "before the engine saw it"])
async def test_a_cancelled_request_that_had_not_started_never_runs(seen: bool):
    async with started(capacity=1) as (engine, model):
        first = await reading(engine, request("a"))
        await model.in_step(1)
        second = await reading(engine, request("b"))
        if seen:
            model.step_gate.let()
            await model.in_step(2)
        engine.cancel(("session", "b"))
        model.step_gate.let()
        (parts,) = await asyncio.gather(*second)
        assert parts[:-1] == ([Queued(1)] if seen else [])
        assert (end(parts).reason, end(parts).completion_tokens, end(parts).timings.started) == ("cancelled", 0, None)
        assert model.steps_of("b") == []
        model.open()
        assert text(await first[0]) == "hello"


async def test_a_cancel_of_a_key_that_is_not_open_is_forgotten():
    async with started() as (engine, model):
        model.open()
        engine.cancel(("session", "a"))
        assert await ends_of(await reading(engine, request("a"))) == [("stop", None)]
        engine.cancel(("session", "a"))
        assert await ends_of(await reading(engine, request("a"))) == [("stop", None)]


# Nobody listening.


async def leave_after(engine: Engine, of: GenerationRequest, kind: type[Part]) -> None:
    async with engine.open(of) as stream:
        async for part in stream:
            if isinstance(part, kind):
                break


@pytest.mark.parametrize(("prompt", "kind"), [("x" * 900, Started), ("x" * 900, Prefill), ("hello", Delta)])
async def test_a_stream_that_is_left_stops_its_request_and_the_engine_goes_on(prompt: str, kind: type[Part]):
    async with started() as (engine, model):
        leaving = asyncio.create_task(leave_after(engine, request("a", prompt), kind))
        model.step_gate.let(1)
        await leaving
        steps = len(model.steps)
        model.open()
        await model.freed_of("a")
        assert len(model.steps) <= steps + 1
        assert (engine.active, engine.queued) == (0, 0)
        assert await ends_of(await reading(engine, request("b"))) == [("stop", None)]


async def test_a_reader_that_is_cancelled_stops_its_request():
    async with started() as (engine, model):
        (task,) = await reading(engine, request("a", "x" * 900))
        await model.in_step(1)
        task.cancel()
        await asyncio.wait([task])
        model.open()
        await model.freed_of("a")
        assert len(model.steps) == 1


async def test_a_request_left_before_the_engine_saw_it_never_runs():
    async with started() as (engine, model):
        first = await reading(engine, request("a"))
        await model.in_step(1)
        async with engine.open(request("b")):
            pass
        model.open()
        assert await ends_of(first) == [("stop", None)]
        assert model.steps_of("b") == []


async def test_a_key_that_was_left_can_be_opened_again_at_once():
    async with started() as (engine, model):
        leaving = asyncio.create_task(leave_after(engine, request("a", "old " * 9), Delta))
        model.step_gate.let(1)
        await leaving
        again = await reading(engine, request("a", "new"))
        model.open()
        (parts,) = await asyncio.gather(*again)
        assert (parts[0], text(parts), end(parts).reason) == (Started(3), "new", "stop")


async def test_a_key_that_has_ended_can_be_opened_again_before_its_stream_is_left():
    async with started() as (engine, model):
        model.open()
        async with engine.open(request("a", "old")) as old:
            assert text([part async for part in old]) == "old"
            again = await reading(engine, request("a", "new " * 50))
        assert await ends_of(again) == [("stop", None)]
        assert text(again[0].result()) == "new " * 50


# Trouble on the thread.


async def test_a_model_that_raises_ends_what_runs_and_nothing_else(caplog: pytest.LogCaptureFixture):
    async with started(capacity=2) as (engine, model):
        tasks = await reading(engine, *(request(id) for id in "abc"))
        model.step_errors[4] = RuntimeError("the secret of another client")
        model.open()
        failed = ("error", "internal")
        assert await ends_of(tasks) == [failed, failed, ("stop", None)]
        assert "the secret" in caplog.text
        assert all("secret" not in repr(task.result()) for task in tasks)
        assert model.held() == set()
        assert not engine.dead


class Odd(ScriptedModel):
    """Does its tricks in the step of the request "odd"."""

    def __init__(self, trick: Callable[[], list[Sampled | None]]) -> None:
        super().__init__()
        self._trick = trick

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        results = super().step(batch)
        at = [part.sequence.request.key[1] for part in batch]
        return results[: at.index("odd")] + self._trick() + results[at.index("odd") + 1 :] if "odd" in at else results


@pytest.mark.parametrize(("sampled", "logged"), [(Sampled(-1), "Traceback"), (Sampled(None), "no numbers")])
async def test_a_token_that_is_none_or_makes_no_text_ends_its_own_request_alone(
    caplog: pytest.LogCaptureFixture, sampled: Sampled, logged: str
):
    async with started(Odd(lambda: [sampled])) as (engine, model):
        tasks = await reading(engine, request("a"), request("odd"), request("b"))
        model.open()
        assert await ends_of(tasks) == [("stop", None), ("error", "internal"), ("stop", None)]
        assert [text(task.result()) for task in tasks] == ["hello", "", "hello"]
        assert logged in caplog.text


def die() -> list[Sampled | None]:
    raise SystemExit("out")


@pytest.mark.parametrize("trick", [die, list], ids=["an exit", "a token too few"])
async def test_a_thread_that_dies_ends_every_stream_once(
    trick: Callable[[], list[Sampled | None]], caplog: pytest.LogCaptureFixture
):
    async with started(Odd(trick), capacity=1) as (engine, model):
        tasks = await reading(engine, *(request(id) for id in ("odd", "a", "b")))
        await model.in_step(1)
        model.open()
        assert await ends_of(tasks) == [("error", "internal")] * 3
        assert "the engine thread died" in [r.message for r in caplog.records if r.levelno == logging.CRITICAL]
        assert engine.dead
        assert (engine.active, engine.queued) == (0, 0)
        late = await parts_of(engine, request("late"))
        assert late == [Finished("error", len("hello"), Timings(0.0), error=thread_module.STOPPED)]


class Sticky(ScriptedModel):
    """Cannot let go of a sequence."""

    def free(self, key: object) -> None:
        raise RuntimeError("stuck")


@pytest.mark.parametrize("cancels", [False, True])
async def test_a_runner_that_fails_to_let_go_leaves_no_stream_without_its_end(cancels: bool):
    async with started(Sticky(), capacity=1) as (engine, model):
        tasks = await reading(engine, *(request(id) for id in "abc"))
        if cancels:
            engine.cancel(("session", "a"))
        model.open()
        assert len(await ends_of(tasks)) == 3


async def test_closing_ends_what_runs_and_what_waits_with_shutdown():
    async with started(capacity=1) as (engine, model):
        tasks = await reading(engine, request("a", "x" * 4000), request("b"), request("c"))
        model.step_gate.let(1)
        await model.in_step(2)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        late = await reading(engine, request("d"))
        model.open()
        await closing
        assert await ends_of(tasks) == [("shutdown", None)] * 3
        assert end(await late[0]).reason in ("shutdown", "error")
        assert len(model.steps) == 2, "the step it was in is the longest it waits"
        assert model.held() == set()
        await engine.close()
        assert await ends_of(await reading(engine, request("e"))) == [("error", "internal")]


async def test_a_closed_engine_leaves_no_thread():
    before = set(threading.enumerate())
    async with started():
        assert set(threading.enumerate()) - before
    left = set(threading.enumerate()) - before
    assert [thread.name for thread in left if not thread.name.startswith("asyncio")] == []


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
async def test_a_load_that_raises_raises_in_start_and_leaves_a_dead_engine(error: BaseException):
    before = set(threading.enumerate())
    model, engine = ScriptedModel(), Engine(EngineSettings(1))
    model.load_errors.append(error)
    with pytest.raises(type(error)):
        await engine.start(lambda: load(model))
    assert await ends_of(await reading(engine, request("a"))) == [("error", "internal")]
    await engine.close()
    await eventually(lambda: not set(threading.enumerate()) - before)


async def test_the_loop_goes_on_while_a_model_loads_and_a_close_meanwhile_counts():
    model, engine = ScriptedModel(), Engine(EngineSettings(1))
    model.load_gate.shut()
    starting = asyncio.create_task(engine.start(lambda: load(model)))
    await model.in_load_stage(1)
    await engine.close()
    model.open()
    await starting
    await eventually(lambda: engine.dead)
    assert await ends_of(await reading(engine, request("a"))) == [("error", "internal")]


async def test_a_full_line_refuses_the_next_and_no_other():
    async with started(capacity=1) as (engine, model):
        running = await reading(engine, request("first"))
        await model.in_step(1)
        waiting = await reading(engine, *(request(str(i)) for i in range(256)))
        model.step_gate.let(1)
        await eventually(lambda: engine.queued == 256)
        refused = await reading(engine, request("one too many"))
        model.step_gate.let(1)
        assert await ends_of(refused) == [("error", "overloaded")]
        assert len(refused[0].result()) == 1
        engine.cancel(("session", "17"))
        model.step_gate.let(1)
        assert await ends_of([waiting.pop(17)]) == [("cancelled", None)]
        waiting += await reading(engine, request("now there is room"))
        model.open()
        assert await ends_of(running + waiting) == [("stop", None)] * 257


@pytest.mark.parametrize("reuses_blocks", [False, True])
@pytest.mark.parametrize("seed", range(3))
async def test_streams_that_the_cache_has_no_room_for_at_once_are_told_everything_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, seed: int, reuses_blocks: bool
):
    monkeypatch.setattr(answer_module, "PREFILL_INTERVAL", 0)
    draw, model = random.Random(seed), ScriptedModel()
    model.block_count, model.max_prefill, model.reuses_blocks = 12, 24, reuses_blocks
    asked = {str(i): "".join(draw.choices("abcd ", k=draw.randint(1, 90))) for i in range(20)}
    async with started(model) as (engine, _):
        tasks = await reading(engine, *(request(id, prompt, max_tokens=100) for id, prompt in asked.items()))
        model.open()
        assert await ends_of(tasks) == [("stop", None)] * len(asked)
        for task, (id, prompt) in zip(tasks, asked.items(), strict=True):
            parts = task.result()
            order = [ORDER.index(type(part)) for part in parts]
            assert (order, order.count(ORDER.index(Started))) == (sorted(order), 1)
            prefilled = [part.done for part in parts if isinstance(part, Prefill)]
            assert prefilled == sorted(set(prefilled))
            assert (text(parts), end(parts).completion_tokens) == (prompt, len(prompt) + 1), id
        again = [id for id in asked for (_, stop), (start, _) in pairwise(model.steps_of(id)) if start < stop]
        assert again, "nobody was preempted"


async def test_moves_in_line_are_told_now_and_then_and_a_new_place_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "POSITIONS_INTERVAL", 3600)
    async with started(capacity=1) as (engine, model):
        tasks = await reading(engine, *(request(str(i), "abcd") for i in range(3)))
        await model.in_step(1)
        tasks += await reading(engine, *(request(str(i), "abcd") for i in range(3, 6)))
        model.open()
        assert await ends_of(tasks) == [("stop", None)] * 6
        told = [[part.position for part in task.result() if isinstance(part, Queued)] for task in tasks]
        assert [len(positions) for positions in told] == [0, 1, 1, 1, 1, 1]


async def test_two_hundred_at_once_on_four_slots_can_all_be_cancelled_in_one_step():
    async with started(capacity=4) as (engine, model):
        tasks = await reading(engine, *(request(str(i), "x" * 30) for i in range(200)))
        model.step_gate.let(40)
        await model.in_step(41)
        for i in range(200):
            engine.cancel(("session", str(i)))
        model.open()
        ends = await ends_of(tasks)
        assert len(model.steps) == 41
        assert max(len(batch) for batch in model.steps) == 4
        served = ends.count(("stop", None))
        assert 0 < served < 8
        assert ends == [("stop", None)] * served + [("cancelled", None)] * (200 - served)
        assert model.held() == set()
        assert await ends_of(await reading(engine, request("next"))) == [("stop", None)]


@pytest.mark.parametrize("prompt", ["hello", "x" * 1000], ids=["in decode", "in prefill"])
async def test_a_cancel_gives_its_slot_to_the_next_in_the_very_next_step(prompt: str):
    async with started(capacity=1) as (engine, model):
        tasks = await reading(engine, request("a", prompt), request("b"))
        await model.in_step(1)
        model.step_gate.let(1)
        await model.in_step(2)
        engine.cancel(("session", "a"))
        model.step_gate.let(1)
        await model.in_step(3)
        assert [[part.sequence.request.key[1] for part in batch] for batch in model.steps] == [["a"], ["a"], ["b"]]
        assert model.frees("a") == 1
        assert await ends_of(tasks[:1]) == [("cancelled", None)], "told before the next step has ended"
        model.open()
        assert await ends_of(tasks[1:]) == [("stop", None)]


# From the thread to the loop.


async def test_a_decode_step_of_many_streams_makes_one_post(monkeypatch: pytest.MonkeyPatch):
    async with started(capacity=4) as (engine, model):
        tasks = await reading(engine, *(request(id, "x" * 50) for id in "abcd"))
        model.step_gate.let(30)
        await eventually(lambda: len(model.steps[-1:] and model.steps[-1]) == 4)
        await model.in_step(31)
        posts: list[object] = []
        loop = asyncio.get_running_loop()
        post = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call, **how: (posts.append(call), post(*call, **how))[1])
        model.step_gate.let(10)
        await model.in_step(41)
        assert [len(batch) for batch in model.steps[30:41]] == [4] * 11
        assert len(posts) == 10
        monkeypatch.undo()
        model.open()
        assert await ends_of(tasks) == [("stop", None)] * 4


async def test_a_reader_that_comes_late_finds_one_delta_and_then_the_end():
    async with started() as (engine, model), engine.open(request("a")) as stream:
        model.open()
        await eventually(lambda: engine.active + engine.queued == 0)
        parts = [part async for part in stream]
        assert parts[:-1] == [Started(5), Delta("hello", 5)]
        assert end(parts).completion_tokens == 6


@pytest.mark.parametrize("seed", range(20))
async def test_a_mailbox_loses_nothing_reorders_nothing_and_stays_small(seed: int):
    draw = random.Random(seed)
    sent: list[Part] = [Queued(i) for i in (3, 2, 1)] + [Started(9)] + [Prefill(i, 9) for i in range(1, 9)]
    sent += [Delta(str(i), draw.randint(1, 3)) for i in range(40)] + [Finished("stop", 9, Timings(1.0))]
    stream, read = GenerationStream(request("a"), lambda stream: None, lambda stream: None), []
    for part in sent:
        stream.put(part)
        if draw.random() < 0.3:
            read.append(await anext(stream))
    rest = [part async for part in stream]
    read += rest
    assert len(rest) <= 5
    assert [kind for kind, last in zip(map(type, read), [None, *map(type, read)], strict=False) if kind is not last] == (
        ORDER
    )
    assert text(read) == text(sent)
    assert sum(p.n for p in read if isinstance(p, Delta)) == sum(p.n for p in sent if isinstance(p, Delta))
    assert read[-1] is sent[-1]


async def test_tokens_per_second_are_counted_over_the_last_five_seconds(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(thread_module, "time", clock)
    async with started() as (engine, model):
        model.open()
        await parts_of(engine, request("a", "x" * 20))
        assert engine.tokens_per_s == 4
        clock.now += 4.9
        await parts_of(engine, request("b", "x" * 10))
        assert engine.tokens_per_s == 6
        clock.now += 4.9
        assert engine.tokens_per_s == 2
        clock.now += 0.2
        assert engine.tokens_per_s == 0


@pytest.mark.parametrize("seed", range(20))
async def test_every_stream_ends_once_whatever_happens_in_whatever_order(seed: int):
    draw, model = random.Random(seed), ScriptedModel()
    model.block_count, model.reuses_blocks = draw.choice([80, 100, 1 << 16]), draw.random() < 0.5
    async with started(model, capacity=draw.randint(1, 3)) as (engine, _):
        tasks: dict[str, asyncio.Task[list[Part]]] = {}
        prompts: dict[str, str] = {}
        for i in range(60):
            match draw.choice(["open", "open", "cancel", "abandon", "step", "step", "raise"]):
                case "open":
                    prompts[str(i)] = "x" * draw.choice([1, 20, 600])
                    tasks[str(i)] = (await reading(engine, request(str(i), prompts[str(i)], max_tokens=640)))[0]
                case "cancel" if tasks:
                    engine.cancel(("session", draw.choice(list(tasks))))
                case "abandon" if tasks:
                    tasks[draw.choice(list(tasks))].cancel()
                case "step":
                    model.step_gate.let(draw.randint(1, 9))
                case "raise" if draw.random() < 0.5:
                    model.step_errors[len(model.steps) + 2] = draw.choice([RuntimeError, MemoryError])("seldom")
            await asyncio.sleep(0)
        if draw.random() < 0.5:
            model.open()
        else:
            model.step_gate.let(2)
            asyncio.get_running_loop().call_later(0, model.open)
            await engine.close()
        answers = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        assert {type(parts) for parts in answers.values()} <= {list, asyncio.CancelledError}
        for id, parts in answers.items():
            if isinstance(parts, list):
                whole = end(parts).reason == "stop"
                assert text(parts) == prompts[id] if whole else prompts[id].startswith(text(parts))
        assert (engine.active, engine.queued) == (0, 0)
        await eventually(lambda: model.held() == set())
