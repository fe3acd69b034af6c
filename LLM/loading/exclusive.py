"""One load at a time: libraries swap settings of the whole process while they build a model.

transformers' `from_pretrained` sets torch's default dtype and replaces `tie_weights`, initialisers and `linspace`, and puts
back what it found. Two threads in it put back each other's settings.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch

log = logging.getLogger(__name__)

LOOK_UP = 0.1  # seconds after which a load that waits looks whether it is still wanted
TELL_EVERY = 30.0  # seconds between two log lines about a load that waits


class Exclusive:
    """A lock whose wait can be given up, and is logged when it gets long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = Lock()
        self._clock = clock
        self._holder = ""

    @contextmanager
    def hold(self, name: str, goes_on: Callable[[], None]) -> Iterator[None]:
        """Hold the lock while the context lasts; `goes_on` is called while waiting, and ends the wait by raising."""
        self._acquire(name, goes_on)
        self._holder = name
        try:
            with _defaults_kept(name):
                yield
        finally:
            self._holder = ""
            self._lock.release()

    def _acquire(self, name: str, goes_on: Callable[[], None]) -> None:
        told = self._clock()
        while not self._lock.acquire(timeout=LOOK_UP):
            goes_on()
            if self._clock() - told >= TELL_EVERY:
                told = self._clock()
                log.warning("loading %s waits for the load of %s to end", name, self._holder or "another model")


@contextmanager
def _defaults_kept(name: str) -> Iterator[None]:
    """Put torch's default dtype back, should a library have lost it: the forward pass of some models depends on it."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            log.error("loading %s left torch's default dtype changed; it is %s again", name, dtype)
            torch.set_default_dtype(dtype)


LOADING = Exclusive()
