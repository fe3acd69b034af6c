"""The engine thread and the border around it: the event loop's side. What runs on the thread is in `worker.py`.

The border is three verbs on plain values: `open(request)`, `async for part in stream`, `cancel(key)`. Requests go in through
an inbox, and so do a cancel, an abandoned stream and the end of the engine; every step's parts come out in one post. No
thread can be killed: one whose step hangs is left behind.
"""

import asyncio
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from traceback import clear_frames
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer

from LLM.engine.clock import MONOTONIC, Clock
from LLM.engine.inbox import Cancel, Close, Inbox, Open, Parts
from LLM.engine.request import Delta, Finished, FinishReason, GenerationRequest, Timings
from LLM.engine.step import Runner
from LLM.engine.stream import GenerationStream
from LLM.engine.turns import Turns
from LLM.engine.watchdog import Watchdog
from LLM.engine.worker import EngineSettings, Worker
from LLM.errors import Reason

log = logging.getLogger(__name__)

RATE_WINDOW = 5.0  # seconds over which tokens per second are measured
PATIENCE = 5.0  # seconds that a close waits for a step

Error = tuple[Reason, str]
STOPPED: Error = ("internal", "the model's engine has stopped; try again, the model is loaded anew")
HUNG: Error = (
    "internal",
    "a step of the model took too long, and its engine was stopped; try again, the model is loaded anew",
)


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

    @property
    def takes_turns(self) -> bool:
        """Whether its steps use what those of other models use too."""
        ...


S = TypeVar("S", bound=Servable)


class GenerationEngine:
    """One model on one executor thread; several that use one CPU take `turns`.

    Every opened stream ends in exactly one Finished, also when the model raises or the thread dies. All methods are to be
    called on the event loop's thread.
    """

    def __init__(self, settings: EngineSettings, turns: Turns | None = None, clock: Clock = MONOTONIC) -> None:
        self.capacity = settings.capacity
        self.max_queue = settings.max_queue
        self.dead = True
        self._turns = turns
        self._clock = clock
        self._settings = settings
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._job: Future[Any] | None = None  # what the thread does: a load, then the worker
        self._inbox: Inbox = queue.SimpleQueue()
        self._streams: dict[Hashable, GenerationStream] = {}
        self._emitted: deque[tuple[float, int]] = deque()
        self._worker: Worker | None = None
        self._steps = 0
        self._run: asyncio.Future[None] | None = None
        self._watchdog = Watchdog(clock, settings.step_timeout, self._step_began, self._hung)
        self._hangs = self._closing = False
        self._on_death: Callable[[], object] = _unheard

    async def start(self, load: Callable[[], S], on_death: "Callable[[], object] | None" = None) -> S:
        """Load a model on the engine's thread and begin to serve it; whatever `load` raises is raised here.

        `on_death` is called if the thread dies after that, or hangs.
        """
        loop = asyncio.get_running_loop()
        try:
            self._job = self._executor.submit(load)
            model: S = await asyncio.wrap_future(self._job)
        except BaseException:
            self._executor.shutdown(wait=False)
            raise

        def post(parts: Parts) -> None:
            loop.call_soon_threadsafe(self._deliver, parts)

        turn = self._turns.take if self._turns and model.takes_turns else nullcontext
        self._worker = Worker(model.runner, model.tokenizer, self._settings, self._inbox, post, turn, self._clock.now)
        self._job = self._executor.submit(self._worker.run)
        self._run = asyncio.wrap_future(self._job)
        self._run.add_done_callback(self._ended)
        self._on_death = on_death or _unheard
        self.dead = False
        return model

    def give_way(self) -> None:
        """Let a step of another model come to its end, on the engine's thread and before there is a model.

        Much of what loads a model keeps all other threads from running: let it not all fall into one step.
        """
        with self._turns.take() if self._turns else nullcontext():
            pass

    async def close(self, patience: float | None = PATIENCE) -> None:
        """End the thread after the step it is in; open streams end with "shutdown". It holds nothing then.

        A step that takes longer than `patience` seconds is left behind, and told in the log; None waits for it.
        """
        self._inbox.put(Close())
        if self._run is None:
            if self.stuck and self._job is not None:
                await asyncio.wait([asyncio.ensure_future(_end_of(self._job))], timeout=patience)
                self._job = None  # what it loaded too late is not held
            return
        self._closing = True
        if not self.dead:
            self._watchdog.watch()
        await asyncio.wait([self._run], timeout=patience)
        if self._run.done():
            # It tells that it is done a moment before it is.
            await asyncio.to_thread(self._executor.shutdown)
        else:
            self.leave_behind()

    def give_up_load(self) -> None:
        """Wait no longer for a load: its thread hangs, and what it takes is not free until that ends."""
        self._hangs = True

    def leave_behind(self) -> None:
        """Wait no longer for a closing engine's step, if it is still in one."""
        if self._run and not self._run.done():
            log.critical("a step of the model has not ended; leaving its thread behind")
            self._give_up("shutdown", None)

    @property
    def has_thread(self) -> bool:
        """Whether its thread loads or runs the model, and holds it."""
        return self._job is not None and not self._job.done()

    @property
    def stuck(self) -> bool:
        """Whether its thread hangs in a step: the engine is dead, but what the model takes is not free."""
        return self._hangs and self.has_thread

    def open(self, request: GenerationRequest) -> GenerationStream:
        """Give the request's stream, to be entered with `async with`."""
        return GenerationStream(request, self._attach, self._detach)

    def cancel(self, key: Hashable) -> None:
        """Ask for an end; the stream goes on to its Finished. A key that is not open is ignored."""
        self._inbox.put(Cancel(key))

    @property
    def active(self) -> int:
        """How many requests are past the line."""
        return sum(stream.started for stream in self._streams.values())

    @property
    def queued(self) -> int:
        """How many requests stand in line."""
        return len(self._streams) - self.active

    @property
    def steps(self) -> int:
        """How many steps it has begun."""
        return self._worker.steps if self._worker else self._steps

    @property
    def tokens_per_s(self) -> float:
        """Tokens handed out per second, over the last five seconds."""
        self._forget_old_tokens()
        return sum(n for _, n in self._emitted) / RATE_WINDOW

    def _attach(self, stream: GenerationStream) -> None:
        self._streams[stream.request.key] = stream
        if self.dead:
            self._fail(stream, "error", STOPPED)
        else:
            self._inbox.put(Open(stream))
            self._watchdog.watch()

    def _detach(self, stream: GenerationStream) -> None:
        if self._forget(stream):
            self._inbox.put(Cancel(stream.request.key))

    def _forget(self, stream: GenerationStream) -> bool:
        if self._streams.get(stream.request.key) is not stream:
            return False
        del self._streams[stream.request.key]
        if not self._streams and not self._closing:
            self._watchdog.rest()
        return True

    def _deliver(self, parts: Parts) -> None:
        tokens = 0
        for stream, part in parts:
            if self._streams.get(stream.request.key) is not stream:
                continue  # abandoned while this part was on its way
            tokens += part.n if isinstance(part, Delta) else 0
            stream.put(part)
            if isinstance(part, Finished):
                self._forget(stream)
        if tokens:
            self._emitted.append((time.monotonic(), tokens))
            self._forget_old_tokens()

    def _forget_old_tokens(self) -> None:
        since = time.monotonic() - RATE_WINDOW
        while self._emitted and self._emitted[0][0] < since:
            self._emitted.popleft()

    def _step_began(self) -> float | None:
        return self._worker.step_began if self._worker else None

    def _hung(self) -> None:
        log.critical("a step takes longer than %g s; giving the engine up", self._settings.step_timeout)
        self._hangs = True
        self._inbox.put(Close())
        self._give_up("error", HUNG)
        self._on_death()

    def _ended(self, run: "asyncio.Future[None]") -> None:
        self._executor.shutdown(wait=False)
        self._steps, self._worker = self.steps, None  # it holds the model
        error = None if run.cancelled() else run.exception()
        if error:
            log.critical("the engine thread died", exc_info=error)
            clear_frames(error.__traceback__)  # what was on the thread's stack holds the model too
        was_dead = self.dead
        self._give_up("error", STOPPED)
        on_death, self._on_death = self._on_death, _unheard
        if error and not was_dead:
            on_death()

    def _give_up(self, reason: FinishReason, error: Error | None) -> None:
        self.dead = True
        self._watchdog.rest()
        for stream in list(self._streams.values()):
            self._fail(stream, reason, error)

    def _fail(self, stream: GenerationStream, reason: FinishReason, error: Error | None) -> None:
        prompt_tokens = len(stream.request.prompt_ids)
        end = Finished(reason, prompt_tokens, Timings(0.0), stream.completion_tokens, error=error)
        self._deliver([(stream, end)])


async def _end_of(job: "Future[Any]") -> None:
    await asyncio.wait([ended := asyncio.wrap_future(job)])
    if not ended.cancelled():
        ended.exception()  # nobody is left to hear of it


def _unheard() -> None:
    """Stand for nobody who wants to know."""
