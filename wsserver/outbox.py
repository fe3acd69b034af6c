"""The frames one connection has not sent yet: one FIFO that merges unread tokens and is bounded in bytes.

Pure: no sockets and no tasks. Frames of different ids may pass each other by merging; frames of one id never do.
"""

from collections import OrderedDict

import msgspec
import orjson

from wsserver.protocol import Done, Error, Loading, Prefill, Queued, ServerMessage, StatusReport, Token, encode

# What a token frame weighs beside its text: the JSON around it.
TOKEN_FRAME_BYTES = 128

_PROGRESS = (Loading, Queued, Prefill)
# What answers a message at once, as fast as a client asks.
_ANSWERS = (StatusReport, Error)


class OutboxFull(Exception):
    """The reader is too slow: what it has not read would pass the bound."""


class Outbox:
    """Frames on their way out: `size` bytes of at most `max_bytes`, with the one that was taken out last.

    Beside them one frame that is larger than the room there is: an honest reader must get it whatever its size.
    """

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self.answer_bytes = 0  # of it, the answers to a client that asks faster than it reads
        # What was taken out last may still lie in this process, behind the socket's.
        self._taken = 0
        self._frames: OrderedDict[int, ServerMessage] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._serial = 0
        # The place of each id's newest unread frame, where the next one may still join it.
        self._last: dict[str, int] = {}
        self._large: int | None = None  # the place of the frame that takes none of the room

    def __len__(self) -> int:
        return len(self._frames)

    def push(self, frame: ServerMessage) -> None:
        """Add a frame; one that continues its id's newest unread frame joins it.

        Raises:
            OutboxFull: the frame was not added.
        """
        id = getattr(frame, "id", None)
        place = self._last.get(id) if id is not None else None
        if place is not None and (one := joined(self._frames[place], frame)):
            # Measuring a growing text again for every token that joins it would cost the square of its length.
            size = self._sizes[place] + _content(frame) if isinstance(frame, Token) else weight(one)
            self._put(place, one, size)
            return
        size = weight(frame)
        large = not self._fits(size) and self._takes_large(frame)
        self._put(self._serial + 1, frame, 0 if large else size)
        self._serial += 1
        if large:
            self._large = self._serial
        elif isinstance(frame, _ANSWERS):
            self.answer_bytes += size
        if id is None:
            return
        if not isinstance(frame, Error):
            self._last[id] = self._serial
        elif place is not None and not isinstance(self._frames[place], Token):
            # An error may end a load; a later load of that id starts afresh. It never ends a generation, whose unread
            # tokens must stay in reach of a cancel.
            del self._last[id]

    def has_room(self, frame: ServerMessage) -> bool:
        """Whether a frame that joins no other one would be taken now."""
        return self._takes_large(frame) or self._fits(weight(frame))

    def pop(self) -> bytes | None:
        """Take the oldest frame out, encoded; None if there is none. The one taken out before it must have gone by then."""
        frame = self.take()
        return None if frame is None else encode(frame)

    def take(self) -> ServerMessage | None:
        """Take the oldest frame out like `pop`, as it is."""
        self.size -= self._taken
        self._taken = 0
        if not self._frames:
            return None
        place, frame = self._frames.popitem(last=False)
        self._taken = self._sizes.pop(place)
        if isinstance(frame, _ANSWERS) and place != self._large:
            self.answer_bytes -= self._taken
        if place == self._large:
            self._large = None
        if isinstance(frame, Done):  # it may be long, and must not keep others out now
            self.size -= self._taken
            self._taken = 0
        id = getattr(frame, "id", None)
        if id is not None and self._last.get(id) == place:
            del self._last[id]
        return frame

    def drop_tokens(self, id: str) -> None:
        """Forget the unread token frame of an id; by merging there is one at most, and it is the id's newest."""
        place = self._last.get(id)
        if place is not None and isinstance(self._frames[place], Token):
            del self._frames[place], self._last[id]
            self.size -= self._sizes.pop(place)
            if place == self._large:
                self._large = None

    def _put(self, place: int, frame: ServerMessage, size: int) -> None:
        grown = self.size + size - self._sizes.get(place, 0)
        if grown > self.max_bytes:
            raise OutboxFull
        self.size = grown
        self._frames[place], self._sizes[place] = frame, size

    def _fits(self, size: int) -> bool:
        return self.size + size <= self.max_bytes

    def _takes_large(self, frame: ServerMessage) -> bool:
        # A reader that has read all else has earned any frame. An end may also wait behind the rest of its answer.
        return self._large is None and (not self.size or isinstance(frame, Done))


def joined(unread: ServerMessage, frame: ServerMessage) -> ServerMessage | None:
    """Make one frame of an id's newest unread one and the next; None if both have to be sent."""
    if isinstance(unread, Token) and isinstance(frame, Token):
        logprobs = None
        if unread.logprobs is not None and frame.logprobs is not None:  # both were asked for them, or neither
            logprobs = unread.logprobs + frame.logprobs  # a new list: the joined frame may yet be refused
        return Token(id=frame.id, seq=unread.seq, n=unread.n + frame.n, text=unread.text + frame.text, logprobs=logprobs)
    if isinstance(frame, _PROGRESS) and type(unread) is type(frame):
        return frame  # progress: only the newest counts
    return None


def weight(frame: ServerMessage) -> int:
    """Give the bytes that a frame takes, about as many as in JSON."""
    if isinstance(frame, Token):
        return TOKEN_FRAME_BYTES + _length(frame.id) + _content(frame)
    return len(encode(frame))


def _content(frame: Token) -> int:
    """Give the bytes that a token frame's content adds to the frame it joins."""
    logprobs = 0 if frame.logprobs is None else len(orjson.dumps(frame.logprobs, default=msgspec.to_builtins))
    return _length(frame.text) + logprobs


def _length(text: str) -> int:
    """Give the bytes of a text in JSON, without its quotes."""
    return len(orjson.dumps(text)) - 2
