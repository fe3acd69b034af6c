"""The time, and what is to happen later, for the event loop's side. A test puts one in its place that it moves itself."""

import asyncio
import time
from collections.abc import Callable


class Clock:
    """The monotonic clock, which the engine's thread reads too, and the event loop's timers."""

    def now(self) -> float:
        """Give the time in seconds."""
        return time.monotonic()

    def later(self, seconds: float, call: Callable[[], object]) -> asyncio.TimerHandle:
        """Have `call` called in so many seconds."""
        return asyncio.get_running_loop().call_later(seconds, call)

    async def pass_by(self, seconds: float) -> None:
        """Wait until so many seconds have passed by."""
        over = asyncio.Event()  # no future, which a cancel in the very turn in which the time is over would have ended
        timer = self.later(seconds, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()


MONOTONIC = Clock()
