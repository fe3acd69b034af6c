"""The thread's side of the engine: inbox, scheduler, runner and answers, one step after the other. Knows no event loop.

The inbox is read before every step, so a step is the longest that a cancel waits.
"""

import logging
import queue
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Protocol

from tokenizers import Tokenizer

from LLM.engine.answer import Answer
from LLM.engine.detokenizer import Detokenizer
from LLM.engine.request import Finished, FinishReason, Part, Queued, Timings
from LLM.engine.scheduler import Scheduler, Slice
from LLM.engine.stream import GenerationStream
from LLM.errors import Reason

log = logging.getLogger(__name__)

FAILED: tuple[Reason, str] = ("internal", "the model failed while generating; try again")


class Runner(Protocol):
    """What runs a model: one call a step, and a word when a sequence is gone."""

    memory_bytes: int

    def step(self, batch: list[Slice]) -> list[int | None]:
        """Advance each slice's sequence; give the token sampled after it, None where its prefill is not finished."""
        ...

    def free(self, key: Hashable) -> None:
        """Drop what is kept of a sequence; the key may be unknown."""
        ...


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a stream's request."""

    stream: GenerationStream


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request; a key that is not open is ignored."""

    key: Hashable


@dataclass(frozen=True, slots=True)
class Close:
    """End every request, and the thread."""


Inbox = queue.SimpleQueue[Open | Cancel | Close]
# Parts go by stream, not by key: a key may be opened again while parts of its last stream are still on their way.
Parts = list[tuple[GenerationStream, Part]]


class Worker:
    """Runs one model's steps until it is told to close."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, capacity: int, inbox: Inbox, post: Callable[[Parts], None]
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(capacity)
        self._answers: dict[Hashable, Answer] = {}
        self._inbox = inbox
        self._post = post
        self._parts: Parts = []

    def run(self) -> None:
        """Serve the inbox; returns once every request has its end."""
        while not self._read_inbox():
            batch = self._scheduler.next_batch()
            self._announce(batch)
            if batch:
                self._step(batch)
        for key in [*self._scheduler.waiting, *self._scheduler.running]:
            self._finish(key, "shutdown")
        self._hand_over()

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
        self._hand_over()

    def _advance(self, part: Slice, token_id: int | None) -> None:
        request = part.sequence.request
        answer = self._answers[request.key]
        if token_id is None:
            if prefill := answer.prefill(part.stop):
                self._parts.append((answer.stream, prefill))
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
                self._parts.append((answer.stream, answer.start()))
        self._parts += [(self._answers[key].stream, Queued(position)) for key, position in self._scheduler.moved()]
        self._hand_over()

    def _read_inbox(self) -> bool:
        """Take every message there is, waiting for one only when there is nothing else to do; true if it is to end."""
        closed, wait = False, self._scheduler.idle
        while wait or not self._inbox.empty():
            wait = False
            message = self._inbox.get()
            match message:
                case Open(stream):
                    self._add(stream)
                case Cancel(key):
                    self._finish(key, "cancelled")
                case Close():
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
            return  # it ended by itself while the cancel was on its way, or was never open
        answer = self._answers.pop(key)
        self._parts.append((answer.stream, replace(answer.finished(reason), error=error)))
        try:
            self._runner.free(key)
        except Exception:
            # Whoever waits for the end is owed it all the same.
            log.exception("the model could not let go of a sequence")

    def _hand_over(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._post(parts)
