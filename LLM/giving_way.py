"""Lets the streams of other models run while this thread does much in Python: whoever waits for it waits a shorter time."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_INTERVAL = 1e-4  # seconds
USUAL = sys.getswitchinterval()


@contextmanager
def giving_way() -> Iterator[None]:
    """Hand the interpreter on soon when another thread asks for it; one step of a stream does so a few hundred times.

    It holds for the whole process. Of two at once the first to end ends it for the other too, which then is as polite as
    Python is.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(USUAL)
