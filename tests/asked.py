"""One message that asks for a generation or a load, and what its client has seen of the answer so far."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(eq=False)
class Seen:
    """What all connections together have seen of one generation."""

    text: str = ""
    scored: list[dict[str, Any]] = field(default_factory=list)
    # How much of the text there was at every seq at which a frame ended.
    borders: dict[int, int] = field(default_factory=lambda: {0: 0})
    cancelled: bool = False  # a cancel was sent on some connection that knew of it


@dataclass(eq=False)
class Asked:
    """One init or generate that was sent, and what came of it on one connection."""

    serial: int
    message: dict[str, Any]
    last: str = "nothing"
    next_seq: int = 0
    text: str = ""
    scored: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, Any] | None = None
    cancels_sent: list[int] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    cancel_was_read: bool = False

    @property
    def kind(self) -> str:
        return self.message["type"]

    def grew(self, seq: int, text: str) -> None:
        """Take what a token frame adds; objects if another connection was told something else."""
        self.next_seq, self.text, seen = seq, self.text + text, self.seen
        shorter, longer = sorted((self.text, seen.text), key=len)
        known = longer.startswith(shorter) and seen.borders.setdefault(seq, len(self.text)) == len(self.text)
        assert known, f"another text than on another connection: {text!r} before seq {seq}"
        if longer is self.text:
            seen.text, seen.scored = self.text, self.scored

    def resumed(self, serial: int, seq: int, cancels: list[int]) -> "Asked":
        """Give what goes on from `seq` on another connection."""
        seen = self.seen
        text, scored = seen.text[: seen.borders[seq]], seen.scored[:seq]
        seen.cancelled |= bool(self.cancels_sent)
        return replace(
            self, serial=serial, last="resumed", next_seq=seq, text=text, scored=scored, done=None, cancels_sent=cancels
        )


# What can be resumed, by id and token, as the last connection that served it has seen it.
Resumable = dict[tuple[str, str], Asked]
