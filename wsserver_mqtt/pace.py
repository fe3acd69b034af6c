"""When a generation's tokens may go out: the first at once, then no more than one message an interval, of all there are.

Pure; whoever calls brings the time.
"""

from wsserver.outbox import joined
from wsserver.protocol import Detached, Done, ServerMessage, Token


class Pace:
    """Holds back tokens that come too soon after the last ones of their id; the end takes them along."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._held: dict[str, Token] = {}
        self._next: dict[str, float] = {}  # when the tokens of an id may go out again

    def push(self, frame: ServerMessage, now: float) -> list[ServerMessage]:
        """Take a frame; give those that may go out now."""
        if isinstance(frame, Done | Detached):
            self._next.pop(frame.id, None)
            held = self._held.pop(frame.id, None)
            return [held, frame] if held else [frame]
        if not isinstance(frame, Token):
            return [frame]
        id = frame.id
        if id in self._held:
            more = joined(self._held[id], frame)
            assert isinstance(more, Token), "tokens of one id always join"
            self._held[id] = more
            return []
        if now < self._next.get(id, now):
            self._held[id] = frame
            return []
        self._next[id] = now + self._interval
        return [frame]

    def due(self) -> float | None:
        """Give when the next held tokens may go out; None if there are none."""
        return min((self._next[id] for id in self._held), default=None)

    def release(self, now: float) -> list[ServerMessage]:
        """Give what may go out by now."""
        ripe = [id for id in self._held if self._next[id] <= now]
        self._next.update(dict.fromkeys(ripe, now + self._interval))
        return [self._held.pop(id) for id in ripe]

    def drop(self, id: str) -> None:
        """Forget the tokens of an id."""
        self._held.pop(id, None)
