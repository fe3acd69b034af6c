"""The engine thread and the border around it: the event loop's side. What runs on the thread is in `worker.py`.

The border is three verbs on plain values: `open(request)`, `async for part in stream`, `cancel(key)`. Requests go in through
an inbox, and so do a cancel, an abandoned stream and the end of the engine; every step's parts come out in one post.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Protocol, TypeVar

from tokenizers import Tokenizer

from LLM.engine.request import Delta, Finished, GenerationRequest, Timings
from LLM.engine.step import Runner
from LLM.engine.stream import GenerationStream
from LLM.engine.worker import Cancel, Close, EngineSettings, Inbox, Open, Parts, Worker
from LLM.errors import Reason

log = logging.getLogger(__name__)

RATE_WINDOW = 5.0  # seconds over which tokens per second are measured

STOPPED: tuple[Reason, str] = ("internal", "the model's engine has stopped; try again, that loads the model anew")


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


class Turns:
    """What the engines of models on one CPU take for each step, one at a time, in the order in which they came.

    A plain lock could go again to the one who leaves it, before those who wait have noticed. And a step that hangs harms
    nobody else: whoever has had a turn for longer than `patience` seconds is no longer waited for.
    """

    def __init__(self, patience: float = 5.0) -> None:
        self._patience = patience
        self._guard = threading.Lock()
        self._line: deque[threading.Lock] = deque()  # the lock of the first one is open
        self._since = 0.0  # when the first one's turn began

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn, and have it while the context lasts."""
        mine = threading.Lock()
        mine.acquire()
        with self._guard:
            self._line.append(mine)
            if len(self._line) == 1:
                self._begin()
        while not mine.acquire(timeout=self._patience):
            with self._guard:
                overdue = time.monotonic() - self._since >= self._patience
                if self._line and self._line[0] is not mine and overdue:
                    self._pass_on()
        try:
            yield
        finally:
            with self._guard:
                if self._line and self._line[0] is mine:  # or it took too long, and another one has its turn
                    self._pass_on()

    def _pass_on(self) -> None:
        self._line.popleft()
        if self._line:
            self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._line[0].release()


class GenerationEngine:
    """One model on one executor thread; several that use one CPU take `turns`.

    Every opened stream ends in exactly one Finished, also when the model raises or the thread dies. All methods are to be
    called on the event loop's thread.
    """

    def __init__(self, settings: EngineSettings, turns: Turns | None = None) -> None:
        self.capacity = settings.capacity
        self.max_queue = settings.max_queue
        self._turns = turns
        self._settings = settings
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._inbox: Inbox = queue.SimpleQueue()
        self._streams: dict[Hashable, GenerationStream] = {}
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

        def post(parts: Parts) -> None:
            loop.call_soon_threadsafe(self._deliver, parts)

        turn = self._turns.take if self._turns and model.takes_turns else nullcontext
        worker = Worker(model.runner, model.tokenizer, self._settings, self._inbox, post, turn)
        self._run = loop.run_in_executor(self._executor, worker.run)
        self._run.add_done_callback(self._ended)
        self.dead = False
        return model

    def give_way(self) -> None:
        """Let a step of another model come to its end, on the engine's thread and before there is a model.

        Much of what loads a model keeps all other threads from running: let it not all fall into one step.
        """
        with self._turns.take() if self._turns else nullcontext():
            pass

    async def close(self) -> None:
        """End the thread after the step it is in; open streams end with "shutdown". It holds nothing then."""
        self._inbox.put(Close())
        if self._run is not None:
            await asyncio.wait([self._run])
            # It tells that it is done a moment before it is.
            await asyncio.to_thread(self._executor.shutdown)

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
    def tokens_per_s(self) -> float:
        """Tokens handed out per second, over the last five seconds."""
        self._forget_old_tokens()
        return sum(n for _, n in self._emitted) / RATE_WINDOW

    def _attach(self, stream: GenerationStream) -> None:
        self._streams[stream.request.key] = stream
        if self.dead:
            self._fail(stream)
        else:
            self._inbox.put(Open(stream))

    def _detach(self, stream: GenerationStream) -> None:
        if self._forget(stream):
            self._inbox.put(Cancel(stream.request.key))

    def _forget(self, stream: GenerationStream) -> bool:
        if self._streams.get(stream.request.key) is not stream:
            return False
        del self._streams[stream.request.key]
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

    def _ended(self, run: "asyncio.Future[None]") -> None:
        self.dead = True
        self._executor.shutdown(wait=False)
        if not run.cancelled() and (error := run.exception()):
            log.critical("the engine thread died", exc_info=error)
        for stream in list(self._streams.values()):
            self._fail(stream)

    def _fail(self, stream: GenerationStream) -> None:
        prompt_tokens = len(stream.request.prompt_ids)
        end = Finished("error", prompt_tokens, Timings(0.0), stream.completion_tokens, error=STOPPED)
        self._deliver([(stream, end)])
