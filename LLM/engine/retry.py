"""When somebody who was turned away should come again. Pure: it is told the times, in seconds."""

from collections.abc import Sequence

from LLM.engine.pacing import FadingMean

UNMEASURED = 1.0  # what is told before any request has run
SHORTEST, LONGEST = 0.1, 60.0


class RetryAfter:
    """Guesses from how long the last requests ran."""

    def __init__(self) -> None:
        self._running = FadingMean()

    def ran(self, seconds: float) -> None:
        """Learn from a request that ran for so long."""
        self._running.add(seconds, 1)

    def guess(self, place: int, capacity: int, running: Sequence[float] = ()) -> float:
        """Say how long it takes until the one in this place of the line would be served, `capacity` at once.

        `running` are the seconds for which those that run have run so far: they take that long, whatever others took.
        """
        so_far = sum(running) / len(running) if running else 0.0
        if self._running.value is None and not so_far:
            return UNMEASURED
        return bounded(max(self._running.value or 0.0, so_far) * place / capacity)


def bounded(seconds: float) -> float:
    """Give what may be told: neither so soon that it is of no use, nor so late that nobody waits for it."""
    return min(max(seconds, SHORTEST), LONGEST)
