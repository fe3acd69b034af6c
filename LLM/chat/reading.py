"""The bounds of reading one prompt: how many tokens it may have, and whether anybody still waits for it.

What encodes looks here between two pieces of its work. It is found by context, not by argument: a drop-in's methods lie
between those who set the bounds and those who keep to them.
"""

import sys
from collections.abc import Iterator
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

    def check(self) -> None:
        """Raise Unwanted if nobody waits any more; called between two pieces of work."""
        if not self.wanted:
            raise Unwanted

    def made(self, tokens: int) -> None:
        """Count tokens that were made of the prompt."""
        self.tokens += tokens
        self.check()

    def check_length(self, at_least: int) -> None:
        """Compare with the limit what a prompt has at least.

        Raises:
            Refused: `context_length_exceeded`.
        """
        if at_least > self.limit:
            why = f"the prompt has more than the {self.limit} tokens that fit; shorten it"
            raise Refused("context_length_exceeded", why, self._field)


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
