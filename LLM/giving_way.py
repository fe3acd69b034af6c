"""Lets streams of other models run while a thread does much in Python: they wait a shorter time for the interpreter."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

SWITCH_INTERVAL = 1e-4  # seconds
USUAL = sys.getswitchinterval()

_lock = Lock()
_inside = 0  # how many contexts are open


@contextmanager
def giving_way() -> Iterator[None]:
    """Hand the interpreter on soon when another thread asks for it; one step of a stream does so a few hundred times.

    It holds for the whole process, until the last of several at once has ended.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(step: int) -> None:
    global _inside
    with _lock:
        _inside += step
        sys.setswitchinterval(SWITCH_INTERVAL if _inside else USUAL)
