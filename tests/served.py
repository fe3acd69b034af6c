"""The worker without a second thread: it serves what is in its inbox until every request has its end.

The inbox and the posts are in the test's hands, and so is the clock, which only the model moves.
"""

import queue
from collections.abc import Callable, Hashable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from LLM.engine import answer as answer_module
from LLM.engine import worker as worker_module
from LLM.engine.inbox import Cancel, Close, Inbox, Open, Parts
from LLM.engine.request import Delta, Finished, GenerationRequest, Part, Prefill, Queued, Sampled, Started
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice
from LLM.engine.stream import GenerationStream
from LLM.engine.worker import EngineSettings, Worker
from LLM.model_srv_wsserver_echo import EchoRunner
from tests.test_thread import TOKENIZER, end, request, text

FAILED = ("error", "internal")
DONE = ("stop", None)
KINDS = {Queued: 0, Started: 1, Prefill: 2, Delta: 3, Finished: 4}


class Model:
    """Echoes like the echo model, on a clock of its own: a step takes a second, and a tenth more for every prompt token."""

    memory_bytes = kv_bytes = 0
    block_size = 16

    def __init__(self, block_count: int = 1 << 16, reuses_blocks: bool = False, max_prefill: int = 256) -> None:
        self.block_count, self.reuses_blocks, self.max_prefill = block_count, reuses_blocks, max_prefill
        self.notes: list[str] = ["a note of before"]
        self.steps: list[list[tuple[str, int, int]]] = []  # the slices of each step that did not fail
        self.tried = 0
        self.freed: list[str] = []
        self.unread: set[int] = set()  # the steps launched ahead whose results were not read
        self.clock = 1000.0
        # What a test does in the middle of a step, by its number; what may go wrong with any step, and with its results.
        self.during: dict[int, Callable[[], object]] = {}
        self.fails: Callable[[list[Slice]], Exception | None] = lambda batch: None
        self.spoils: Callable[[Slice, Sampled], Sampled] = lambda part, sampled: sampled

    def monotonic(self) -> float:
        return self.clock

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        self.tried += 1
        if act := self.during.get(self.tried):
            act()
        self.clock += 1 + sum(part.stop - part.start for part in batch if not part.decodes) / 10
        if error := self.fails(batch):
            raise error
        self.steps.append([(name(part), part.start, part.stop) for part in batch])
        results = EchoRunner().step(batch)
        return [sampled and self.spoils(part, sampled) for part, sampled in zip(batch, results, strict=True)]

    def free(self, key: Hashable) -> None:
        self.freed.append(key[1])  # type: ignore[index]

    def steps_of(self, id: str) -> list[tuple[int, int]]:
        return [(start, stop) for batch in self.steps for part, start, stop in batch if part == id]

    @property
    def prefilled(self) -> int:
        """How many tokens went forward in prefills, those computed twice counted twice."""
        return sum(stop - start for batch in self.steps for _, start, stop in batch if stop - start > 1)


class AheadModel(Model):
    """The same model, launched one ahead. Every launch sees to it that what is in flight can be found on a device."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: list[str] = []
        self.fails_reading: Callable[[int], Exception | None] = lambda number: None
        self._sampled: list[Sequence] = []

    def launch(self, batch: list[Slice]) -> Callable[[], list[Sampled | None]]:
        assert len(self.unread) < 2, "the step before the last one was read"
        for part in batch:
            *known, last = part.sequence.token_ids
            assert IN_FLIGHT not in known
            assert last != IN_FLIGHT or part.sequence in self._sampled
            assert not (part.sequence.needs_its_tokens and last == IN_FLIGHT)
        results, number = self.step(batch), self.tried
        self._sampled = [part.sequence for part in batch if part.samples]
        self.calls.append(f"launch {number}")
        self.unread.add(number)

        def read() -> list[Sampled | None]:
            self.calls.append(f"read {number}")
            self.unread.remove(number)
            if error := self.fails_reading(number):
                raise error
            return results

        return read


def name(part: Slice) -> str:
    return part.sequence.request.key[1]  # type: ignore[index]


class Served:
    """Serves requests until all have ended, and keeps what each was told."""

    def __init__(self, model: Model, *requests: GenerationRequest, capacity: int = 4, max_queue: int = 256) -> None:
        self.parts: dict[str, list[Part]] = {}
        self._heard: dict[GenerationStream, list[Part]] = {}  # the same lists: an id may be opened again
        self.steps_at: dict[str, int] = {}  # how many steps had been tried when each ended
        self.then: Callable[[str], object] = lambda id: None  # what a test does when one has ended
        self._model = model
        self._unfinished = 0
        self._inbox: Inbox = queue.SimpleQueue()
        self.open(*requests)
        settings = EngineSettings(capacity, max_queue=max_queue)
        self.worker = Worker(model, TOKENIZER, settings, self._inbox, self._post)

    def open(self, *requests: GenerationRequest) -> None:
        for one in requests:
            stream = GenerationStream(one, lambda stream: None, lambda stream: None)
            self.parts[one.key[1]] = self._heard[stream] = []  # type: ignore[index]
            self._unfinished += 1
            self._inbox.put(Open(stream))

    def cancel(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._inbox.put(Cancel(("session", id)))

    def close(self) -> None:
        self._inbox.put(Close())

    def run(self) -> "Served":
        self.worker.run()
        for parts in self.parts.values():
            assert_in_order(parts)
        pool = self.worker._scheduler.pool
        assert pool.free == pool.count, "blocks leaked"
        assert not self.worker._answers
        assert sorted(self._model.freed) == sorted(id for id in self.parts if self.ends[id][1] != "context_length_exceeded")
        return self

    @property
    def ends(self) -> dict[str, tuple[str, str | None]]:
        return {id: (end(parts).reason, (end(parts).error or (None,))[0]) for id, parts in self.parts.items()}

    @property
    def texts(self) -> dict[str, str]:
        return {id: text(parts) for id, parts in self.parts.items()}

    def _post(self, parts: Parts) -> None:
        assert parts, "a post of nothing wakes the loop for nothing"
        for stream, part in parts:
            id = stream.request.key[1]  # type: ignore[index]
            self._heard[stream].append(part)
            if isinstance(part, Finished):
                self.steps_at[id] = self._model.tried
                self._unfinished -= 1
                self.then(id)
        if not self._unfinished:
            self.close()


def assert_in_order(parts: list[Part]) -> None:
    """Queued*, Started?, Prefill*, Delta*, Finished; a prefill only grows, and no token is counted twice."""
    kinds = [KINDS[type(part)] for part in parts]
    assert kinds == sorted(kinds)
    assert kinds.count(KINDS[Started]) <= 1
    done = [part.done for part in parts if isinstance(part, Prefill)]
    assert done == sorted(set(done))
    assert sum(part.n for part in parts if isinstance(part, Delta)) <= end(parts).completion_tokens


def on_its_clock(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    clock = SimpleNamespace(monotonic=model.monotonic)
    monkeypatch.setattr(worker_module, "time", clock)
    monkeypatch.setattr(answer_module, "time", clock)
    return model


def words(count: int, length: int = 20) -> dict[str, str]:
    return {str(i): f"{i:03} {'abcdefghijklmnop' * length}"[:length] for i in range(count)}


def requests(texts: dict[str, str], **details: Any) -> list[GenerationRequest]:
    return [request(id, prompt, **details) for id, prompt in texts.items()]


def tokens(batch: list[Slice]) -> int:
    return sum(part.stop - part.start for part in batch)
