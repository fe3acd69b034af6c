"""When a model whose engine died is loaded anew: once by itself, then for whoever asks for it, each time later. Pure."""

from math import inf

QUIET = 300.0  # so many seconds without a death, and those before are forgotten
FIRST, LONGEST = 1.0, 60.0  # seconds of back-off, which each death in a row doubles


class Restarts:
    """The deaths of one model's engines, and the loads that followed; the times are those of any one clock, in seconds."""

    def __init__(self) -> None:
        # How often it was loaded anew.
        self.count = 0
        # Whether its engine has died and it was not loaded since; and whether it will be without anybody's asking.
        self.down = False
        self.by_itself = False
        self._seconds = 0.0  # of back-off
        self._not_before = -inf
        self._last = -inf

    def died(self, now: float) -> None:
        """Count a death. After the first for some time it is to be loaded anew `by_itself`."""
        self.down, self.by_itself = True, self.forgotten(now)
        self._seconds = FIRST if self.by_itself else min(2 * self._seconds, LONGEST)
        self._not_before = now + self._seconds
        self._last = now

    def back_off(self, now: float) -> float:
        """Give the seconds for which it must not be loaded yet."""
        return max(0.0, self._not_before - now)

    def loaded(self, now: float) -> None:
        """Count a load, if it followed a death."""
        if self.down:
            self.count += 1
            self.down = self.by_itself = False
            self._last = now

    def gave_up(self) -> None:
        """Leave it to the next who asks."""
        self.by_itself = False

    def forgotten(self, now: float) -> bool:
        """Whether the deaths are so long ago that they say nothing any more."""
        return now - self._last >= QUIET
