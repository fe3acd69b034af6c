"""The thread's side of the engine: inbox, scheduler, runner and answers, one step after the other. Knows no event loop.

The inbox is read before every step, so a step is the longest that a cancel waits.
"""

import logging
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from LLM.engine.answer import Answer
from LLM.engine.inbox import Cancel, Close, Inbox, Open, Parts
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import Finished, FinishReason, GenerationRequest, Queued, Sampled, Timings
from LLM.engine.retry import RetryAfter
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice
from LLM.engine.step import Flight, Runner, RunsAhead
from LLM.engine.stream import GenerationStream
from LLM.errors import Reason

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "ran out of memory"
POSITIONS_INTERVAL = 0.2  # seconds between two updates of the queue positions that are sent
FAILED: tuple[Reason, str] = ("internal", "the model failed while generating; try again")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an operator wants a model to run: so many sequences at once, and so much longer a step that prefills too.

    No more than `max_queue` requests wait for their turn. A step that takes longer than `step_timeout` seconds hangs. While
    others wait, one owner runs at most `max_active_per_client` sequences, None for half of the capacity.
    """

    capacity: int = 8
    prefill_stretch: float = 3.0
    max_queue: int = 256
    step_timeout: float = 120.0
    max_active_per_client: int | None = None


class Worker:
    """Runs one model's steps until it is told to close."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        settings: EngineSettings,
        inbox: Inbox,
        post: Callable[[Parts], None],
        turn: Callable[[], AbstractContextManager[object]] = nullcontext,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._ahead = runner if isinstance(runner, RunsAhead) else None
        self._tokenizer = tokenizer
        self._pacing = Pacing(runner.max_prefill, settings.prefill_stretch)
        pool = BlockPool(runner.block_count, runner.block_size)
        self._capacity = settings.capacity
        self._scheduler = Scheduler(
            settings.capacity,
            pool,
            self._pacing,
            settings.max_queue,
            runner.reuses_blocks,
            settings.max_active_per_client,
        )
        self._retry = RetryAfter()
        self._answers: dict[Hashable, Answer] = {}
        self._inbox = inbox
        self._post = post
        self._turn = turn
        self._now = now
        self._parts: Parts = []
        self._flight: Flight | None = None
        self._landed_at = self._positions_told = 0.0
        # For the event loop's side to look at: how many steps there were, and since when one runs, by its clock.
        self.steps = 0
        self.step_began: float | None = None

    def run(self) -> None:
        """Serve the inbox; returns once every request has its end."""
        while not self._read_inbox(wait=self._scheduler.idle):
            with self._turn():
                self.step_began = self._now()
                # What came while another model had its turn counts for this step.
                if self._read_inbox(wait=False):
                    break
                self._next_step()
                self.step_began = None
        for key in self._scheduler.keys:
            self._finish(key, "shutdown")
        self._hand_over()

    def _next_step(self) -> None:
        """Make the next step, of whatever there is to do."""
        for key in self._scheduler.expired(time.monotonic()):
            self._finish(key, "timeout")
        if self._flight and any(part.sequence.needs_its_tokens for part in self._flight.batch):
            self._land()
        batch = self._scheduler.next_batch()
        self._announce(batch)
        self._step(batch)

    def _step(self, batch: list[Slice]) -> None:
        """Launch a step, and read the results of the one before; where nothing runs ahead, its own."""
        launched = self._launch(batch) if batch else None
        # Launched work is done in its order. So the blocks of those who end here may be given to others at once, though
        # the step just launched still writes to them: whoever gets them writes later.
        if self._flight:
            self._land()
        if launched:
            # Only now: to make a block findable its tokens must be known, those of the step before among them.
            self._scheduler.retire(batch)
            self._flight = launched
            if self._ahead and not self._scheduler.idle:
                for part in batch:
                    if part.samples:
                        part.sequence.token_ids.append(IN_FLIGHT)
            else:
                self._land()
        self._hand_over()

    def _launch(self, batch: list[Slice]) -> Flight | None:
        self.steps += 1
        began = time.monotonic()
        decoding = sum(part.decodes for part in batch)
        prefilled = sum(part.stop - part.start for part in batch) - decoding
        try:
            if self._ahead:
                read = self._ahead.launch(batch)
            else:
                results = self._runner.step(batch)
                read = lambda: results  # noqa: E731 - there is nothing left to wait for
        except MemoryError:
            log.exception("not enough memory for a step of %d sequences", len(batch))
            self._spare_memory(batch)
        except Exception:  # told in the log, and to those it ends
            self._fail_running()
        else:
            return Flight(batch, decoding, prefilled, began, read)
        return None

    def _land(self) -> None:
        """Read the results of the step in flight, and hand them to those that are still there."""
        flight, self._flight = self._flight, None
        assert flight, "there is a step in flight"
        try:
            results = flight.read()
        except Exception:  # told in the log, and to those it ends
            for part in flight.batch:  # one that was preempted meanwhile stands in line: its token is drawn again
                part.sequence.forget_in_flight()
            self._fail_running()
            return
        now = time.monotonic()
        self._pacing.measured(flight.decoding, flight.prefilled, now - max(flight.began, self._landed_at))
        self._landed_at = now
        for part, sampled in zip(flight.batch, results, strict=True):
            if self._scheduler.holds(part.sequence):
                part.sequence.forget_in_flight()
                self._advance(part, sampled)

    def _advance(self, part: Slice, sampled: Sampled | None) -> None:
        key = part.sequence.request.key
        try:
            if sampled is None:
                self._prefilled(key, part.stop)
            elif sampled.token_id is None:
                log.error("a step gave one request no token: no memory, or logits that are no numbers; ending that request")
                # Its keys and values may be none either: nobody who begins alike is to find them.
                self._scheduler.distrust(part.sequence)
                self._finish(key, "error", FAILED)
            else:
                self._sampled(key, sampled.token_id, sampled)
        except BaseException:  # a panic in the tokenizer's Rust code is no Exception
            log.exception("one request's tokens could not be made text; ending that request")
            self._finish(key, "error", FAILED)

    def _prefilled(self, key: Hashable, done: int) -> None:
        answer = self._answers[key]
        if prefill := answer.prefill(done):
            self._parts.append((answer.stream, prefill))

    def _sampled(self, key: Hashable, token_id: int, sampled: Sampled) -> None:
        answer = self._answers[key]
        delta, reason = answer.take(token_id, sampled.alternatives)
        if delta:
            self._parts.append((answer.stream, delta))
        if reason:
            self._finish(key, reason)

    def _spare_memory(self, batch: list[Slice]) -> None:
        """Go on with less in a step: fewer prompt tokens, then fewer sequences, and only then without those that run."""
        carries_prompts = not all(part.decodes for part in batch)
        notes = [note for note in self._runner.notes if not note.startswith(OUT_OF_MEMORY)]
        if (carries_prompts and self._pacing.shrink()) or self._scheduler.run_one_less():
            note = f"at most {self._pacing.largest} prompt tokens and {self._scheduler.capacity} sequences in a step"
            notes.append(f"{OUT_OF_MEMORY}: {note}")
        else:
            # Even alone it was too large: that says nothing of how many others fit.
            self._fail_running()
            self._pacing.largest, self._scheduler.capacity = self._runner.max_prefill, self._capacity
        self._runner.notes = notes

    def _fail_running(self) -> None:
        # Whatever the model did, what its KV cache holds can no longer be trusted; those in line lose nothing.
        log.exception("the model raised in a step; ending its %d running generations", len(self._scheduler.running))
        for key in list(self._scheduler.running):
            self._finish(key, "error", FAILED)
        self._scheduler.pool.forget(range(self._scheduler.pool.count))

    def _announce(self, batch: list[Slice]) -> None:
        """Post what is true before the step: who starts now, who waits where, who has ended."""
        for part in batch:
            if part.begins:
                answer = self._answers[part.sequence.request.key]
                self._parts.append((answer.stream, answer.start()))
        # Where many come and go, telling all of them at each step would take more time than the steps.
        now = time.monotonic()
        only_new = now - self._positions_told < POSITIONS_INTERVAL
        if not only_new:
            self._positions_told = now
        moved = self._scheduler.moved(only_new)
        self._parts += [(self._answers[key].stream, Queued(position)) for key, position in moved]
        self._hand_over()

    def _read_inbox(self, wait: bool) -> bool:
        """Take every message there is, if need be after waiting for one; true if it is to end."""
        closed = False
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
        if not self._scheduler.can_ever_run(request):
            end = Finished("error", len(request.prompt_ids), Timings(0.0), error=self._too_long(request))
            self._parts.append((stream, end))
            return
        self._answers[request.key] = Answer(stream, self._scheduler.add(request), self._tokenizer)
        if surplus := self._scheduler.surplus():
            self._turn_away(surplus)

    def _turn_away(self, sequence: Sequence) -> None:
        # A new try is taken once the next one of its owner's has left the line.
        place = self._scheduler.place_of_owner(sequence)
        running = [self._answers[key].ran for key in self._scheduler.running]
        seconds = self._retry.guess(place, self._scheduler.capacity, running)
        message = f"{self._scheduler.max_queue} requests may wait for this model, and they do; try again in {seconds:.1f} s"
        self._finish(sequence.request.key, "error", ("overloaded", message), seconds)

    def _too_long(self, request: GenerationRequest) -> tuple[Reason, str]:
        room = self._runner.block_count * self._runner.block_size
        tokens = len(request.prompt_ids)
        asked = f"the prompt's {tokens} tokens and the {request.max_tokens} asked for do not fit"
        advice = "shorten the prompt or lower max_tokens"
        return "context_length_exceeded", f"{asked} into this model's cache of {room} tokens; {advice}"

    def _finish(
        self,
        key: Hashable,
        reason: FinishReason,
        error: tuple[Reason, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        if self._scheduler.remove(key) is None:
            return  # it ended by itself while the cancel was on its way, or was never open
        answer = self._answers.pop(key)
        end = replace(answer.finished(reason), error=error, retry_after=retry_after)
        self._parts.append((answer.stream, end))
        if end.timings.started is not None:
            self._retry.ran(end.timings.total - end.timings.started)
        try:
            self._runner.free(key)
        except Exception:
            # Whoever waits for the end is owed it all the same.
            log.exception("the model could not let go of a sequence")

    def _hand_over(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._post(parts)
