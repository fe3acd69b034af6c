"""The ends of generations, for a while: whoever asks the same again is given the answer, not another generation.

MQTT may deliver a message twice, and whoever was away when the answer came may ask once more. Pure; whoever calls brings the
time. Bounded in time and in bytes: what was forgotten is generated anew.
"""

from collections import OrderedDict
from typing import NamedTuple

from wsserver.outbox import weight
from wsserver.protocol import Done

MAX_BYTES = 4 << 20


class Asked(NamedTuple):
    """Who asked: the topic of the answer, whose request it was, and its id."""

    reply: str
    owner: tuple[str, str]
    id: str


class _End(NamedTuple):
    digest: bytes
    done: Done
    size: int
    at: float


class Answered:
    """The dones of the last `window` seconds, by who asked and by a digest of what was asked."""

    def __init__(self, window: float, max_bytes: int = MAX_BYTES) -> None:
        self.size = 0
        self._window = window
        self._max_bytes = max_bytes
        self._ends: OrderedDict[Asked, _End] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, asked: Asked, digest: bytes, done: Done, now: float) -> None:
        """Keep an end; the last one of the same id is forgotten for it."""
        if asked in self._ends:
            self._forget(asked)
        end = _End(digest, done, weight(done), now)
        self._ends[asked] = end
        self.size += end.size
        self._tidy(now)

    def find(self, asked: Asked, digest: bytes, now: float) -> Done | None:
        """Give the end of what was asked in the same words; None if there is none, or it was long ago."""
        self._tidy(now)
        end = self._ends.get(asked)
        return end.done if end and end.digest == digest else None

    def _tidy(self, now: float) -> None:
        while self._ends:
            oldest, end = next(iter(self._ends.items()))
            if self.size <= self._max_bytes and now - end.at < self._window:
                return
            self._forget(oldest)

    def _forget(self, asked: Asked) -> None:
        self.size -= self._ends.pop(asked).size
