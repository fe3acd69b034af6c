"""How many prompt tokens a step may carry beside the running streams, from what steps were measured to take.

Pure: it is told the times. A prompt computed in one go would freeze every stream that runs; one computed in crumbs would
never start. So a step that carries both may take `stretch` times as long as one that only decodes.
"""

FADING = 0.7  # how much of what was measured before still counts after each measurement
FIRST_GUESS = 32  # prompt tokens beside streams, before any were measured
SMALLEST = 8
# So many steps may pass without one that only decodes; then one is made, because the measure goes stale.
STALE = 32


class Pacing:
    """Measures decode steps and prompt tokens, and says how many of the latter fit."""

    def __init__(self, largest: int, stretch: float = 3.0) -> None:
        self.largest = largest
        self.stretch = stretch
        self._decode_step = FadingMean()
        self._prompt_token = FadingMean()
        self._mixed_steps = 0

    def prefill_budget(self, decoding: int) -> int:
        """Give how many prompt tokens the next step may carry beside `decoding` streams; 0 for a step to measure by."""
        if not decoding:
            return self.largest
        if self._decode_step.value is None or self._mixed_steps >= STALE:
            return 0
        if self._prompt_token.value is None:
            return min(FIRST_GUESS, self.largest)
        spare = (self.stretch - 1) * self._decode_step.value
        fits = spare / max(self._prompt_token.value, 1e-9)
        # Up to some size a chunk may cost next to nothing, and beyond it much: no more than what was measured lately.
        return min(self.largest, max(SMALLEST, int(min(fits, self._prompt_token.units))))

    def measured(self, decoding: int, prefilled: int, seconds: float) -> None:
        """Learn from a step that took `seconds` for `decoding` streams and `prefilled` prompt tokens."""
        if not prefilled:
            self._decode_step.add(seconds, 1)
            self._mixed_steps = 0
        elif self._decode_step.value is not None:
            # What a step costs before its first prompt token is about what a decode step costs.
            self._prompt_token.add(max(seconds - self._decode_step.value, 0.0), prefilled)
            self._mixed_steps += bool(decoding)

    def shrink(self) -> bool:
        """Carry half as much from now on; False if that is not possible."""
        if self.largest <= SMALLEST:
            return False
        self.largest //= 2
        return True


class FadingMean:
    """Cost per unit, the newest measurements counting most; None before the first."""

    def __init__(self) -> None:
        self.units = 0.0
        self._cost = 0.0

    @property
    def value(self) -> float | None:
        """The mean cost of a unit."""
        return self._cost / self.units if self.units else None

    def add(self, cost: float, units: int) -> None:
        """Take in a measurement."""
        self._cost = self._cost * FADING + cost
        self.units = self.units * FADING + units
