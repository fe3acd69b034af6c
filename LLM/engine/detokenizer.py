"""Token ids to text that is safe to show: no half character, no part of a stop string. Knows one answer at a time.

The byte-level work is `tokenizers.decoders.DecodeStream`; this adds what it lacks, the flush at the end and stop strings.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from LLM.engine.undecodable import REPLACEMENT, Undecodable

# A few ids before the next one, at first the prompt's, tell a decoder whether a leading space belongs to the text.
CONTEXT = 8
# So many ids may wait for the rest of a character, which has four bytes at most, or be special tokens among these.
PENDING = 8


class Detokenizer:
    """Turns one answer's token ids into text, piece by piece.

    The pieces joined are the tokenizer's decoding of all ids, without special tokens, without an incomplete last
    character, and cut before the stop string that was complete first. What a push costs does not grow with the tokens
    before it: of tokens that make no character, a few are kept in case they begin one, and older ones are shown as what the
    tokenizer makes of them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._known = self._context(list(prompt_ids[-CONTEXT:]))
        self._stream = DecodeStream(ids=self._known, skip_special_tokens=True)
        self._unread: list[int] = []
        self._undecodable: Undecodable | None = None  # what reads on while no character comes
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that became safe to show, often one token's, sometimes none."""
        text = self._read(token_id)
        return self._release(text) if text else ""

    def flush(self) -> str:
        """Return what was held back, once no more tokens will come."""
        if self.stopped:
            return ""
        text = self._release(self._undecoded())
        held, self._held = self._held, ""
        return text + held

    def _read(self, token_id: int) -> str:
        if self._undecodable:
            return self._read_on([token_id])
        self._unread.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # Byte tokens that make no character can change how those just before them decode, which are shown already;
            # the stream gives up then. Go on from what is not shown yet.
            text = self._decode(self._unread)
            self._stream = DecodeStream(ids=self._unread, skip_special_tokens=True)
        if text is None:
            return self._read_on(self._take_unread()) if len(self._unread) > PENDING else ""
        self._known = (self._known + self._take_unread())[-CONTEXT:]
        return text

    def _read_on(self, token_ids: list[int]) -> str:
        reader = self._undecodable or Undecodable(self._tokenizer, self._context(self._known))
        text = "".join([reader.push(token_id) for token_id in token_ids])
        self._undecodable = reader if reader.pending else None
        if not reader.pending:
            self._known = self._context(reader.ids[-CONTEXT:])
            self._stream = DecodeStream(ids=self._known, skip_special_tokens=True)
        return text

    def _take_unread(self) -> list[int]:
        unread, self._unread = self._unread, []
        return unread

    def _undecoded(self) -> str:
        if self._undecodable:
            return self._undecodable.rest.rstrip(REPLACEMENT)
        # DecodeStream keeps ids that may be part of a character and never gives them up; decode them by difference.
        whole = self._decode(self._known + self._unread)
        return whole[len(self._decode(self._known)) :].rstrip(REPLACEMENT)

    def _context(self, tail: list[int]) -> list[int]:
        # A stream seeded with a text that ends in what looks like half a character would show that text again. The tail may
        # begin inside a character, which spoils a run of byte tokens; or the prompt really ends so.
        parts = [tail[i:] for i in range(len(tail))] + [tail[:i] for i in range(len(tail), -1, -1)]
        return next(ids for ids in parts if not self._decode(ids).endswith(REPLACEMENT))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        held = self._held + text
        if matches := _matches(held, self._stop):
            self.stopped, self._held = True, ""
            return held[: min(matches)[1]]
        keep = _length_of_begun_stop(held, self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _matches(text: str, stop: Sequence[str]) -> list[tuple[int, int]]:
    """Give (end, start) of every stop string's first place in `text`.

    The smallest end is the one that would have been complete first had the characters come one by one, so the cut does
    not depend on where the tokens' borders fall; of those that end together the longest counts.
    """
    return [(start + len(s), start) for s in stop if (start := text.find(s)) >= 0]


def _length_of_begun_stop(text: str, stop: Sequence[str]) -> int:
    """Give the length of the longest end of `text` that some stop string begins with."""
    longest = max(len(s) - 1 for s in stop)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)
