"""Runs work that blocks, on daemon threads of its own: bounded, and fair between owners. Knows no models.

asyncio's default executor has threads that the interpreter's exit waits for, and one queue for all. Here each kind of work
has its own threads, and an exit leaves behind what hangs.
"""

import asyncio
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from LLM.engine.clock import MONOTONIC, Clock
from LLM.errors import Reason, Refused

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 1.0  # seconds that a close waits for calls
CLOSED: tuple[Reason, str] = ("overloaded", "the server is stopping")


class _Call(Generic[T]):
    """One piece of work, and what came of it."""

    def __init__(self, work: Callable[[], T], owner: Hashable) -> None:
        self.loop = asyncio.get_running_loop()
        self.owner = owner
        self.future: asyncio.Future[T] = self.loop.create_future()
        self.began: float | None = None
        self._work = work
        self._result: T
        self._error: BaseException | None = None

    def do(self) -> None:
        """Do the work, on a thread."""
        try:
            self._result = self._work()
        except StopIteration as error:  # which no future takes
            self._error = RuntimeError(repr(error))
        except BaseException as error:  # a panic in Rust code is no Exception
            self._error = error
        del self._work

    def tell(self) -> None:
        """Hand over what came of it, on the event loop."""
        if self.future.done():
            return
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._result)


class BlockingCalls:
    """The threads of one kind of work. Owners take turns, and each has one call at work at a time."""

    def __init__(self, what: str, threads: int, max_waiting: int, patience: float, clock: Clock = MONOTONIC) -> None:
        """Make them; a call that runs for more than `patience` seconds counts as hung."""
        self._what = what
        self._threads = threads
        self._max_waiting = max_waiting
        self._patience = patience
        self._clock = clock
        self._started = 0
        self._waiting = 0
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None
        # The owner whose turn it is comes first; each has a call that waits.
        self._owners: OrderedDict[Hashable, deque[_Call[Any]]] = OrderedDict()
        self._running: dict[Hashable, _Call[Any]] = {}
        self._todo: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()

    async def run(self, work: Callable[[], T], owner: Hashable = None) -> T:
        """Do `work` on a thread. A cancelled call that has not begun never begins.

        Raises:
            Refused: `overloaded`, where too many wait and this owner has the most, or the calls were closed before it began.
        """
        if self._closed:
            raise Refused(*CLOSED)
        call = _Call(work, owner)
        self._owners.setdefault(owner, deque()).append(call)
        self._waiting += 1
        self._begin()
        if self._waiting > self._max_waiting:
            self._refuse_one()
        try:
            return await call.future
        finally:
            if call.began is None:
                self._take_out(call)

    @property
    def busy(self) -> bool:
        """Whether a call is at work: Python's exit could not wait for it."""
        return bool(self._running)

    @property
    def problem(self) -> str | None:
        """What is wrong, in words; None if no call hangs."""
        now = self._clock.now()
        hangs = any(now - (call.began or now) > self._patience for call in self._running.values())
        return f"{self._what} hangs" if hangs else None

    async def close(self, patience: float = PATIENCE) -> None:
        """End the threads, each after the call it is in; one that takes longer than `patience` seconds is left behind.

        What waits never begins.
        """
        self._closed = True
        for call in [call for calls in self._owners.values() for call in calls]:
            self._refuse(call, *CLOSED)
        for _ in range(self._started):
            self._todo.put(None)
        if self._running:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._emptied], timeout=patience)
            if self.busy:
                log.critical("%s has not ended; leaving its thread behind", self._what)

    def _begin(self) -> None:
        while len(self._running) < self._threads:
            owner = next((owner for owner in self._owners if owner not in self._running), self)
            if owner is self:
                return
            call = self._owners[owner][0]
            self._take_out(call)
            if owner in self._owners:
                self._owners.move_to_end(owner)
            call.began = self._clock.now()
            self._running[owner] = call
            if self._started < len(self._running):
                self._started += 1
                threading.Thread(target=self._work, name=self._what, daemon=True).start()
            self._todo.put(call)

    def _take_out(self, call: _Call[Any]) -> None:
        theirs = self._owners.get(call.owner)
        if theirs and call in theirs:
            theirs.remove(call)
            self._waiting -= 1
            if not theirs:
                del self._owners[call.owner]

    def _refuse_one(self) -> None:
        # Of the owner who has the most: one client does not take the places of all.
        why = f"too many others wait for the same ({self._what}); try again in a moment"
        self._refuse(max(self._owners.values(), key=len)[-1], "overloaded", why)

    def _refuse(self, call: _Call[Any], reason: Reason, why: str) -> None:
        self._take_out(call)
        if not call.future.done():  # its owner may have cancelled it in this very turn
            call.future.set_exception(Refused(reason, why))

    def _done(self, call: _Call[Any]) -> None:
        del self._running[call.owner]
        call.tell()
        self._begin()
        if self._emptied and not self._running and not self._emptied.done():
            self._emptied.set_result(None)

    def _work(self) -> None:
        while call := self._todo.get():
            call.do()
            try:
                call.loop.call_soon_threadsafe(self._done, call)
            except RuntimeError:  # the loop has ended, and nobody is left to hear of it
                log.debug("%s ended after its event loop", self._what)
            del call


class DefaultExecutor(ThreadPoolExecutor):
    """The event loop's default executor, for what libraries do there; it tells whether that has ended."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="default")
        self._open: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """Do as the base class does, and remember it."""
        future = super().submit(fn, *args, **kwargs)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    @property
    def busy(self) -> bool:
        """Whether a call is at work or waits."""
        return bool(self._open)
