"""Notices that a step hangs: from the event loop, for the thread cannot tell. Knows of a step only when it began."""

import asyncio
from collections.abc import Callable

from LLM.engine.clock import Clock


class Watchdog:
    """Calls `bark` when a step takes longer than `patience` seconds; `began` says since when one runs, if one does."""

    def __init__(self, clock: Clock, patience: float, began: Callable[[], float | None], bark: Callable[[], None]) -> None:
        self._clock = clock
        self._patience = patience
        self._began = began
        self._bark = bark
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Look now, and again whenever the step that is seen then would have taken too long."""
        if self._timer is None:
            self._look()

    def rest(self) -> None:
        """Look no more."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        began = self._began()
        left = self._patience - (self._clock.now() - began if began is not None else 0.0)
        self._timer = self._clock.later(left, self._look) if left > 0 else None
        if self._timer is None:
            self._bark()
