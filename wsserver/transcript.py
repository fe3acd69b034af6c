"""What was said of one generation, kept for those who come late: its pieces as they came, and its end.

Pure: no tasks, no clock. A reader stands at a `seq` where some frame ended, and is given what follows in frames as long as
it likes.
"""

from array import array
from bisect import bisect_left
from itertools import chain

from msgspec.structs import replace

from wsserver.outbox import weight
from wsserver.protocol import Done, Token, TokenLogprob

# What an answer weighs beside its pieces: the task, the request and the bookkeeping around them.
BYTES = 4096


class Transcript:
    """One answer so far. Without `streams` its text is told in its done alone, and so it has no frames before that."""

    def __init__(self, id: str, streams: bool = True) -> None:
        self.id = id
        self.size = BYTES  # in bytes
        self.done: Done | None = None
        self._streams = streams
        self._texts: list[str] = []
        self._logprobs: list[list[TokenLogprob]] = []
        # Where each piece begins, and behind them where the next one will.
        self._seqs = array("q", [0])

    @property
    def tokens(self) -> int:
        """How many tokens it holds: the `seq` of the next piece."""
        return self._seqs[-1]

    def add(self, frame: Token) -> None:
        """Append the next piece."""
        self._texts.append(frame.text)
        if frame.logprobs is not None:
            self._logprobs.append(frame.logprobs)
        self._seqs.append(frame.seq + frame.n)
        self.size += weight(frame)

    def end(self, done: Done) -> Done:
        """Append the end; give it as it is to be told, with the whole answer if that was not streamed."""
        if not self._streams:
            done = replace(done, text="".join(self._texts), logprobs=list(chain(*self._logprobs)) or None)
            self._texts.clear()
            self._logprobs.clear()
        self.done = done
        return done

    def drop_tokens(self) -> None:
        """Forget the pieces: after a cancel only the end is told."""
        self._texts.clear()
        self._logprobs.clear()
        self._seqs = array("q", [self.tokens])
        self.size = BYTES

    def reaches(self, seq: int) -> bool:
        """Whether a reader can stand there: some piece begins or ends there, or did before the pieces were dropped."""
        if not self._streams:
            return seq == 0
        place = bisect_left(self._seqs, seq)
        return seq < self._seqs[0] or (place < len(self._seqs) and self._seqs[place] == seq)

    def after(self, seq: int, max_bytes: int) -> Token | Done | None:
        """Give the frame that follows `seq`: pieces of some `max_bytes` as one, or the end; None if it is still to come."""
        if not self._streams or seq >= self.tokens or not self._texts:
            return self.done
        first = last = bisect_left(self._seqs, seq)
        room = max_bytes
        while last < len(self._texts) and (last == first or room > 0):
            room -= len(self._texts[last]) + (len(self._logprobs[last]) << 10 if self._logprobs else 0)
            last += 1
        logprobs = list(chain(*self._logprobs[first:last])) if self._logprobs else None
        text = "".join(self._texts[first:last])
        return Token(id=self.id, seq=seq, n=self._seqs[last] - seq, text=text, logprobs=logprobs)
