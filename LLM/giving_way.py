"""Lets streams run while another thread does much in Python: they wait a shorter time for the interpreter."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

SWITCH_INTERVAL = 1e-4  # seconds
USUAL = sys.getswitchinterval()


class _Interval:
    """The process's switch interval, short as long as one of several contexts is open."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0  # how many contexts are open

    def enter(self, step: int) -> None:
        with self._lock:
            self._inside += step
            sys.setswitchinterval(SWITCH_INTERVAL if self._inside else USUAL)


_interval = _Interval()


@contextmanager
def giving_way() -> Iterator[None]:
    """Hand the interpreter on soon when another thread asks for it; one step of a stream does so a few hundred times.

    It holds for the whole process, until the last of several at once has ended.
    """
    _interval.enter(1)
    try:
        yield
    finally:
        _interval.enter(-1)
