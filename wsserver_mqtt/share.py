"""How much of the event loop's time messages from the broker may take. Pure; the caller brings the time."""

from wsserver.limits import TokenBucket

# Of the time, and the seconds of work that may be done at once after a quiet time. Reading a packet takes some 70
# microseconds, answering one several times that.
SHARE = 0.2
BURST = 0.02
_UNIT = 1000  # a bucket counts in ones, here milliseconds


class Share:
    """Says how long to rest after some work."""

    def __init__(self, share: float = SHARE, burst: float = BURST) -> None:
        self._bucket = TokenBucket(share * _UNIT, burst * _UNIT)

    def rest_after(self, worked: float, now: float) -> float:
        """Count seconds of work; return the seconds until there may be more, 0 if there may be now."""
        self._bucket.spend(worked * _UNIT, now)
        return self._bucket.wait(now)
