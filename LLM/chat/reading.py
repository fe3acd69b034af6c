"""The bounds of reading one prompt: how many tokens it may have, and whether anybody still waits for it.

What encodes looks here between two pieces of its work. It is found by context, not by argument: a drop-in's methods lie
between those who set the bounds and those who keep to them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from LLM.errors import Refused


class Unwanted(Exception):
    """Whoever asked for the prompt's tokens waits for them no more."""


class Reading:
    """One prompt on its way to token ids."""

    def __init__(self, limit: int, field: str) -> None:
        """Begin; `limit` is in tokens, and `field` names the prompt in a request."""
        self.limit = limit
        self.wanted = True
        self.tokens = 0  # that were made so far, to be paid for
        self._field = field
        self._guessed = False  # whether tokens may have been made that were not counted
        self._why = f"this server takes prompts of up to {limit} tokens, and this one has more"

    def read(self, encode: Callable[[], list[int]]) -> list[int]:
        """Make the tokens within these bounds."""
        self.check()
        self._guessed = True
        with within(self):
            ids = encode()
        self.tokens = len(ids)
        return ids

    def end(self, characters: int) -> None:
        """Wait for the tokens no more; of a prompt of so many characters in which nothing was counted yet, guess it."""
        self.wanted = False
        if self._guessed and not self.tokens:
            self.tokens = characters // 4

    def check(self) -> None:
        """Raise Unwanted if nobody waits any more; called between two pieces of work."""
        if not self.wanted:
            raise Unwanted

    def made(self, tokens: int) -> None:
        """Count tokens that were made of the prompt."""
        self.tokens += tokens
        self.check()

    def fit(self, context_length: int) -> None:
        """Keep to a model's context too, with room for one token of an answer."""
        if context_length <= self.limit:
            self.limit = context_length - 1
            self._why = f"this model's context is {context_length} tokens, and the prompt alone has as many or more"

    def check_length(self, at_least: int) -> None:
        """Compare with the limit what a prompt has at least.

        Raises:
            Refused: `context_length_exceeded`.
        """
        if at_least > self.limit:
            self._guessed = (
                False  # what was made of it was counted, and of one that is too long at a glance nothing was made
            )
            raise Refused("context_length_exceeded", f"{self._why}; shorten it", self._field)


_UNBOUNDED = Reading(sys.maxsize, "prompt")
_current: ContextVar[Reading] = ContextVar("reading", default=_UNBOUNDED)


def reading() -> Reading:
    """Return the bounds of what this thread reads."""
    return _current.get()


@contextmanager
def within(bounds: Reading) -> Iterator[None]:
    """Have what this thread reads keep to some bounds."""
    token = _current.set(bounds)
    try:
        yield
    finally:
        _current.reset(token)
