"""A log handler that clients cannot flood: of each kind of line some come at once, then one a second with a count.

A kind is a place in the code, so there are no more kinds than places, whatever a client writes into a line.
"""

import copy
import logging
import time
from collections.abc import Callable

from wsserver.limits import TokenBucket

# Lines of one kind a second, and at once after a quiet time.
RATE, BURST = 1.0, 20.0


class LimitedHandler(logging.StreamHandler):  # type: ignore[type-arg]  # of any stream
    """Writes to stderr. Lines of level debug are for one who wants them all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # By file and line: what may still be written, and how many lines were left out.
        self._buckets: dict[tuple[str, int], TokenBucket] = {}
        self._left_out: dict[tuple[str, int], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count it."""
        kind = (record.pathname, record.lineno)
        if record.levelno > logging.DEBUG:
            bucket = self._buckets.setdefault(kind, TokenBucket(RATE, BURST))
            if bucket.take(self._clock()):
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return
        if left_out := self._left_out.pop(kind, 0):
            record = copy.copy(record)  # other handlers get it as it was
            record.msg, record.args = f"{record.getMessage()} (and {left_out} more lines like this one)", None
        super().emit(record)
