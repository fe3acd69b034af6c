"""When somebody who was turned away should come again. Pure: it is told the times, in seconds."""

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

    def guess(self, place: int, capacity: int) -> float:
        """Say how long it takes until the one in this place of the line would be served, `capacity` at once."""
        return UNMEASURED if self._running.value is None else bounded(self._running.value * place / capacity)


def bounded(seconds: float) -> float:
    """Give what may be told: neither so soon that it is of no use, nor so late that nobody waits for it."""
    return min(max(seconds, SHORTEST), LONGEST)
