"""Whose step is next where several models share one CPU. Knows only that somebody waits."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class Turns:
    """What the engines of models on one CPU take for each step, one at a time, in the order in which they came.

    A plain lock could go again to the one who leaves it, before those who wait have noticed. And a step that hangs harms
    nobody else: whoever has had a turn for longer than `patience` seconds is no longer waited for.
    """

    def __init__(self, patience: float = 5.0) -> None:
        self._patience = patience
        self._guard = Lock()
        self._line: deque[Lock] = deque()  # the lock of the first one is open
        self._since = 0.0  # when the first one's turn began

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn, and have it while the context lasts."""
        mine = Lock()
        mine.acquire()
        with self._guard:
            self._line.append(mine)
            if len(self._line) == 1:
                self._begin()
        while not mine.acquire(timeout=self._patience):
            with self._guard:
                overdue = time.monotonic() - self._since >= self._patience
                if self._line and self._line[0] is not mine and overdue:
                    self._pass_on()
        try:
            yield
        finally:
            with self._guard:
                if self._line and self._line[0] is mine:  # or it took too long, and another one has its turn
                    self._pass_on()

    def _pass_on(self) -> None:
        self._line.popleft()
        if self._line:
            self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._line[0].release()
