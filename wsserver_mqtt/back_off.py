"""How long to wait before a broker is tried again. Pure."""

import random
from collections.abc import Iterator

FIRST, LONGEST = 0.5, 30.0


def delays(first: float = FIRST, longest: float = LONGEST, draw: random.Random | None = None) -> Iterator[float]:
    """Give the seconds of one wait after the other: twice as long each time, and drawn from half of that on.

    Without the draw all servers of a broker that comes back would come at the same moment.
    """
    draw = draw or random.SystemRandom()
    delay = first
    while True:
        yield delay * draw.uniform(0.5, 1.0)
        delay = min(2 * delay, longest)
