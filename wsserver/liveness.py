"""Whether a peer still takes what it is sent: told from what its TCP acknowledged and from what it said.

Pure: whoever calls brings the numbers and the time. The library's own keepalive wants a pong within a time, but a ping waits
behind what is unsent, and a pong behind what a slow reader has not read yet. So pings only see to it here that there is
always something to be acknowledged; the verdict is from the acknowledgements.
"""

from typing import Literal, NamedTuple

# Seconds between two pings; a part of the stall timeout where that is short.
PING_INTERVAL = 10.0
# A peer that says nothing, no pong either, is given up though something acknowledges for it: a proxy whose client has gone.
# Soon, if it took so few bytes since that they were pings; late otherwise, in seconds, because a pong may wait behind
# minutes of text that a slow reader has taken and not yet read.
PINGS_ONLY = 256
SILENT_AFTER = 300.0

Verdict = Literal["stalled", "silent"]


class Traffic(NamedTuple):
    """One connection's bytes so far: acknowledged by the peer, received from it, and those it still has to take."""

    acknowledged: int
    received: int
    outstanding: int


def ping_interval(stall_timeout: float) -> float:
    """Give the seconds between pings, several of which must fit into a stall."""
    return min(PING_INTERVAL, stall_timeout / 3)


class Liveness:
    """One peer's signs of life, looked at every now and then."""

    def __init__(self, now: float, stall_timeout: float) -> None:
        self._stall_timeout = stall_timeout
        self._last = Traffic(0, 0, 0)
        self._took_at = now
        self._caught_up_at = now  # when something was last waiting for it
        self._spoke_at = now
        self._taken_since = 0  # bytes, since it last spoke

    def verdict(self, now: float, traffic: Traffic) -> Verdict | None:
        """Say what is wrong at `now` seconds; None if nothing is.

        A peer that has vanished is found by this too: it took its last bytes, those of a ping perhaps, before it went,
        and the next ping is outstanding soon after.
        """
        if traffic.acknowledged != self._last.acknowledged:
            self._took_at = now
        self._taken_since += traffic.acknowledged - self._last.acknowledged
        if traffic.received != self._last.received:
            self._spoke_at, self._taken_since = now, 0
        waits = self._last.outstanding and traffic.outstanding  # also a moment ago: an answer takes its time
        self._last = traffic
        if waits and now - self._took_at >= self._stall_timeout:
            return "stalled"
        if waits:
            self._caught_up_at = now
        patience = self._stall_timeout if self._taken_since <= PINGS_ONLY else SILENT_AFTER
        return "silent" if now - max(self._spoke_at, self._caught_up_at) >= patience else None
