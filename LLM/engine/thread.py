"""The engine thread: the only place where a model runs, and the border around it.

The border is three verbs on plain values: `open(request)`, `async for part in stream`, `cancel(key)`. Requests and cancels
go in through an inbox; every step's parts come out in one post to the event loop. A cancel, an abandoned stream and the end
of the engine are all inbox messages, read before every step, so a step is the longest anyone waits.
"""

import asyncio
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from tokenizers import Tokenizer

from LLM.engine.answer import Answer
from LLM.engine.detokenizer import Detokenizer
from LLM.engine.request import Delta, Finished, FinishReason, GenerationRequest, Part, Prefill, Queued, Started, Timings
from LLM.engine.scheduler import Scheduler, Slice
from LLM.engine.stream import GenerationStream
from LLM.errors import Reason

log = logging.getLogger(__name__)

RATE_WINDOW = 5.0  # seconds over which tokens per second are measured

FAILED: tuple[Reason, str] = ("internal", "the model failed while generating; try again")
STOPPED: tuple[Reason, str] = ("internal", "the model's engine has stopped; send init to load the model again")


class Runner(Protocol):
    """What runs a model: one call a step, and a word when a sequence is gone."""

    memory_bytes: int

    def step(self, batch: list[Slice]) -> list[int | None]:
        """Advance each slice's sequence; give the token sampled after it, None where its prefill is not finished."""
        ...

    def free(self, key: Hashable) -> None:
        """Drop what is kept of a sequence; the key may be unknown."""
        ...


class Servable(Protocol):
    """What an engine needs of a loaded model."""

    @property
    def runner(self) -> Runner:
        """Runs the model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Makes text of its ids."""
        ...


S = TypeVar("S", bound=Servable)


@dataclass(frozen=True, slots=True)
class _Open:
    stream: GenerationStream


@dataclass(frozen=True, slots=True)
class _Cancel:
    key: Hashable


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Inbox = queue.SimpleQueue[_Open | _Cancel | _Close]
# Parts go by stream, not by key: a key may be opened again while parts of its last stream are still on their way.
_Post = list[tuple[GenerationStream, Part]]


class GenerationEngine(Generic[S]):
    """One model on one executor thread.

    Every opened stream ends in exactly one Finished, also when the model raises or the thread dies. All methods are to be
    called on the event loop's thread.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._inbox: _Inbox = queue.SimpleQueue()
        self._streams: dict[Hashable, GenerationStream] = {}
        self._waiting: set[GenerationStream] = set()
        self._emitted: deque[tuple[float, int]] = deque()
        self._run: asyncio.Future[None] | None = None
        self.dead = True

    async def start(self, load: Callable[[], S]) -> S:
        """Load a model on the engine's thread and begin to serve it; whatever `load` raises is raised here."""
        loop = asyncio.get_running_loop()
        try:
            model = await loop.run_in_executor(self._executor, load)
        except BaseException:
            self._executor.shutdown(wait=False)
            raise

        def post(parts: _Post) -> None:
            loop.call_soon_threadsafe(self._deliver, parts)

        worker = _Worker(model.runner, model.tokenizer, self.capacity, self._inbox, post)
        self._run = loop.run_in_executor(self._executor, worker.run)
        self._run.add_done_callback(self._ended)
        self.dead = False
        return model

    async def close(self) -> None:
        """End the thread after the step it is in; open streams end with "shutdown"."""
        self._inbox.put(_Close())
        if self._run is not None:
            await asyncio.wait([self._run])

    def open(self, request: GenerationRequest) -> GenerationStream:
        """Give the request's stream, to be entered with `async with`."""
        return GenerationStream(request, self._attach, self._detach)

    def cancel(self, key: Hashable) -> None:
        """Ask for an end; the stream goes on to its Finished. A key that is not open is ignored."""
        self._inbox.put(_Cancel(key))

    @property
    def active(self) -> int:
        """How many requests are past the line."""
        return len(self._streams) - len(self._waiting)

    @property
    def queued(self) -> int:
        """How many requests stand in line."""
        return len(self._waiting)

    @property
    def tokens_per_s(self) -> float:
        """Tokens handed out per second, over the last five seconds."""
        since = time.monotonic() - RATE_WINDOW
        while self._emitted and self._emitted[0][0] < since:
            self._emitted.popleft()
        return sum(n for _, n in self._emitted) / RATE_WINDOW

    def _attach(self, stream: GenerationStream) -> None:
        self._streams[stream.request.key] = stream
        self._waiting.add(stream)
        if self.dead:
            self._fail(stream)
        else:
            self._inbox.put(_Open(stream))

    def _detach(self, stream: GenerationStream) -> None:
        if self._forget(stream):
            self._inbox.put(_Cancel(stream.request.key))

    def _forget(self, stream: GenerationStream) -> bool:
        self._waiting.discard(stream)
        if self._streams.get(stream.request.key) is not stream:
            return False
        del self._streams[stream.request.key]
        return True

    def _deliver(self, parts: _Post) -> None:
        tokens = 0
        for stream, part in parts:
            if self._streams.get(stream.request.key) is not stream:
                continue  # abandoned while this part was on its way
            if isinstance(part, Started):
                self._waiting.discard(stream)
            tokens += part.n if isinstance(part, Delta) else 0
            stream.put(part)
            if isinstance(part, Finished):
                self._forget(stream)
        if tokens:
            self._emitted.append((time.monotonic(), tokens))

    def _ended(self, run: "asyncio.Future[None]") -> None:
        self.dead = True
        self._executor.shutdown(wait=False)
        if not run.cancelled() and (error := run.exception()):
            log.critical("the engine thread died", exc_info=error)
        for stream in list(self._streams.values()):
            self._fail(stream)

    def _fail(self, stream: GenerationStream) -> None:
        end = Finished("error", stream.prompt_tokens, Timings(0.0), stream.completion_tokens, error=STOPPED)
        self._deliver([(stream, end)])


class _Worker:
    """The thread's side: inbox, scheduler, runner and detokenisers, one step after the other."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, capacity: int, inbox: _Inbox, post: Callable[[_Post], None]
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(capacity)
        self._answers: dict[Hashable, Answer] = {}
        self._inbox = inbox
        self._send = post
        self._parts: _Post = []

    def run(self) -> None:
        while not self._read_inbox():
            batch = self._scheduler.next_batch()
            self._announce(batch)
            if batch:
                self._step(batch)
        for key in [*self._scheduler.waiting, *self._scheduler.running]:
            self._finish(key, "shutdown")
        self._post()

    def _step(self, batch: list[Slice]) -> None:
        try:
            token_ids = self._runner.step(batch)
        except Exception:
            # Whatever the model did, its running sequences' caches can no longer be trusted; those in line can.
            log.exception("the model raised in a step; ending its %d running generations", len(self._scheduler.running))
            for key in list(self._scheduler.running):
                self._finish(key, "error", FAILED)
        else:
            for part, token_id in zip(batch, token_ids, strict=True):
                try:
                    self._advance(part, token_id)
                except BaseException:  # a panic in the tokenizer's Rust code is no Exception
                    log.exception("one request's tokens could not be made text; ending that request")
                    self._finish(part.sequence.request.key, "error", FAILED)
        self._post()

    def _advance(self, part: Slice, token_id: int | None) -> None:
        request = part.sequence.request
        answer = self._answers[request.key]
        if token_id is None:
            if answer.prefill_is_due():
                self._parts.append((answer.stream, Prefill(part.stop, len(request.prompt_ids))))
            return
        delta, reason = answer.take(token_id)
        if delta:
            self._parts.append((answer.stream, delta))
        if reason:
            self._finish(request.key, reason)

    def _announce(self, batch: list[Slice]) -> None:
        """Post what is true before the step: who starts now, who waits where, who has ended."""
        for part in batch:
            if part.begins:
                answer = self._answers[part.sequence.request.key]
                answer.started = time.monotonic()
                self._parts.append((answer.stream, Started(len(answer.request.prompt_ids))))
        self._parts += [(self._answers[key].stream, Queued(position)) for key, position in self._scheduler.moved()]
        self._post()

    def _read_inbox(self) -> bool:
        """Take every message there is, waiting for one only when there is nothing else to do; true if it is to end."""
        closed, wait = False, self._scheduler.idle
        while wait or not self._inbox.empty():
            wait = False
            message = self._inbox.get()
            match message:
                case _Open(stream):
                    self._add(stream)
                case _Cancel(key):
                    self._finish(key, "cancelled")
                case _Close():
                    closed = True
        return closed

    def _add(self, stream: GenerationStream) -> None:
        request = stream.request
        sequence = self._scheduler.add(request)
        if sequence is None:
            message = f"{self._scheduler.max_waiting} requests wait already; try later"
            end = Finished("error", len(request.prompt_ids), Timings(0.0), error=("overloaded", message))
            self._parts.append((stream, end))
            return
        detokenizer = Detokenizer(self._tokenizer, request.prompt_ids, request.stop)
        self._answers[request.key] = Answer(stream, sequence, detokenizer)

    def _finish(self, key: Hashable, reason: FinishReason, error: tuple[Reason, str] | None = None) -> None:
        if self._scheduler.remove(key) is None:
            return  # ended by itself while the cancel was on its way
        answer = self._answers.pop(key)
        self._parts.append((answer.stream, replace(answer.finished(reason), error=error)))
        try:
            self._runner.free(key)
        except Exception:
            # Whoever waits for the end is owed it all the same.
            log.exception("the model could not let go of a sequence")

    def _post(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._send(parts)
