"""Those who wait for a model's load: told how it goes, and where they stand in a line that is fair and bounded."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from LLM.engine.clock import Clock
from LLM.engine.retry import bounded
from LLM.engine.scheduling.fair_queue import FairQueue
from LLM.errors import Refused


class LoadPermission(Protocol):
    """Whether a client may have a model loaded.

    Both methods raise `Refused` if it may not.
    """

    def check(self) -> None:
        """Check the permission before any work is done for the load."""
        ...

    def spend(self) -> None:
        """Check it again, and count the load that begins now."""
        ...


class Waiter:
    """One who waits for a load: told of its progress, and of his place in line if he stands in it.

    The line is fair between owners, and between the users of each. Without a `permission` every load is allowed.
    """

    def __init__(
        self,
        on_progress: Callable[[str, float], None] | None = None,
        on_position: Callable[[int], None] | None = None,
        owner: Hashable = None,
        user: Hashable = None,
        permission: LoadPermission | None = None,
    ) -> None:
        self.on_progress = on_progress
        self.on_position = on_position
        self.owner = owner
        self.user = user
        self.permission = permission


class Waiters:
    """All who wait for one load.

    No more than `max_queue` may stand in line, and as many clients' others may wait beside it: those want no turn.
    """

    def __init__(self, max_queue: int, clock: Clock) -> None:
        self._max_queue = max_queue
        self._clock = clock
        self._began = clock.now()
        # Each with what turns it away.
        self._turned_away: dict[Waiter, asyncio.Future[Refused]] = {}
        self._line: FairQueue[Waiter] = FairQueue()
        self._others: FairQueue[Waiter] = FairQueue()
        self._telling = False

    def __len__(self) -> int:
        return len(self._turned_away)

    @property
    def in_line(self) -> int:
        """How many stand in line."""
        return len(self._line)

    async def stand_by(self, waiter: Waiter, load: asyncio.Future[Any]) -> None:
        """Wait until a load has ended, however it did.

        Raises:
            Refused: too many wait, and this one would be served last.
        """
        turned_away = self._turned_away[waiter] = asyncio.get_running_loop().create_future()
        if waiter.on_position:
            self._join(self._line, waiter)
            self._line_moved()
        elif waiter.owner is not None:
            self._join(self._others, waiter)
        try:
            await asyncio.wait([load, turned_away], return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._turned_away[waiter]
            self._others.leave(waiter)
            # When the load has ended all leave; there is nothing to be told.
            if self._line.leave(waiter) and not load.done():
                self._line_moved()
        if not load.done():
            raise turned_away.result()

    def tell_progress(self, stage: str, done: float) -> None:
        """Tell all who want to know how far the load is."""
        for waiter in self._turned_away:
            if waiter.on_progress:
                waiter.on_progress(stage, done)

    def _join(self, line: FairQueue[Waiter], waiter: Waiter) -> None:
        line.join(waiter, waiter.owner, waiter.user)
        if len(line) > self._max_queue and (last := line.last):
            line.leave(last)
            self._turned_away[last].set_result(self._too_many())

    def _too_many(self) -> Refused:
        # How long it still takes nobody knows; as long again as until now is a guess that grows with what it is about.
        seconds = bounded(self._clock.now() - self._began)
        most = f"{self._max_queue} requests may wait for this model while it is loaded, and they do"
        return Refused("overloaded", f"{most}; try again in {seconds:.1f} s", retry_after=seconds)

    def _line_moved(self) -> None:
        # Once a turn of the loop: many who leave together must not each have everybody behind them told.
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell_positions)

    def _tell_positions(self) -> None:
        self._telling = False
        for waiter, position in self._line.moved():
            if waiter.on_position:
                waiter.on_position(position)
