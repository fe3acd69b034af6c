"""One message that asks for a generation or a load, and what its client has seen of the answer so far."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(eq=False)
class Asked:
    """One init or generate that was sent, and what came of it."""

    serial: int
    message: dict[str, Any]
    last: str = "nothing"
    next_seq: int = 0
    text: str = ""
    scored: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, Any] | None = None
    cancels_sent: list[int] = field(default_factory=list)
    cancelled_before: bool = False  # a cancel was sent on a connection that had it before
    # Of cancels sent on any connection that knew of it: all states of one generation share this.
    cancelled_anywhere: list[bool] = field(default_factory=list)
    cancel_was_read: bool = False
    # How much of the text there was at every seq at which a frame began or would have, on any connection.
    borders: dict[int, int] = field(default_factory=lambda: {0: 0})

    @property
    def kind(self) -> str:
        return self.message["type"]

    def resumed(self, serial: int, seq: int, cancels: list[int]) -> "Asked":
        """Give what goes on from `seq` on another connection."""
        state = replace(self, serial=serial, last="resumed", next_seq=seq, done=None, cancels_sent=cancels)
        state.cancelled_before = self.cancelled_before or bool(self.cancels_sent)
        state.text, state.scored = self.text[: self.borders[seq]], self.scored[:seq]
        return state


# What can be resumed, by id and token, as the last connection that served it has seen it.
Resumable = dict[tuple[str, str], Asked]
