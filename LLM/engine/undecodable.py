"""Token ids that make no character yet, read with a bounded memory. Knows no stop strings and no answer.

A byte-level decoder decides about a byte once three more have come. Where a token is a byte by name (`<0x80>`, as in the
Llama and Gemma families), all bytes of a run are U+FFFD if the run as a whole is no UTF-8.
"""

import re
from collections.abc import Sequence
from itertools import takewhile

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4  # bytes of a character
BYTE = re.compile("<0x[0-9A-F]{2}>")


class Undecodable:
    """Reads ids after those of a text that is shown, until they end in a whole character."""

    def __init__(self, tokenizer: Tokenizer, known: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.ids = list(known)  # the last ids, of whose text so many characters are shown
        self._shown = len(self._decode(self.ids))
        self._decided = len(self.ids)  # how many of the ids can no longer begin a character
        self._spoilt = False  # inside a run of byte tokens that is no UTF-8
        self.pending = False  # whether the last character may still be incomplete

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that no later token can change."""
        if not self._has_text(token_id):
            return ""
        if self._spoilt and self._is_byte(token_id):
            self.ids, self._decided, self._shown = [token_id], 1, len(self._decode([token_id]))
            return REPLACEMENT
        self._spoilt = False
        self.ids.append(token_id)
        text = self._decode(self.ids)
        self.pending = text.endswith(REPLACEMENT)
        run = self._run()
        if run >= LONGEST and self.pending:
            # Four bytes or more that are no character: nothing mends the run, so all of it is decided.
            self._spoilt = True
            return self._keep(1, text, held=0)
        if not self.pending:
            return self._keep(len(self.ids), text, held=0)
        if len(self.ids) > 2 * LONGEST:
            # A run that is kept must be kept from its first undecided byte on, or it would read otherwise.
            return self._keep(run or LONGEST, text, run or 1, run)
        return ""

    @property
    def rest(self) -> str:
        """What is held back, as it reads if nothing more comes."""
        return self._decode(self.ids)[self._shown :]

    def _keep(self, count: int, text: str, held: int, run: int = 0) -> str:
        """Return the text but the last `held` characters, and keep the last ids: all of an undecided `run`."""
        decided = text[self._shown : len(text) - held]
        self.ids = self.ids[-count:]
        self._decided = 0 if run else len(self.ids)
        self._shown = len(self._decode(self.ids)) - held
        return decided

    def _run(self) -> int:
        """Return how many undecided ids at the end are bytes by name."""
        return len(list(takewhile(self._is_byte, reversed(self.ids[self._decided :]))))

    def _is_byte(self, token_id: int) -> bool:
        name = self._tokenizer.id_to_token(token_id)
        return name is not None and bool(BYTE.fullmatch(name)) and self._decode([token_id]) != name

    def _has_text(self, token_id: int) -> bool:
        if self._tokenizer.id_to_token(token_id) is None:
            return False
        # A special token is nothing, and harmless between two bytes of a character. A space may be nothing by itself.
        return self._decode([token_id]) != "" or not self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
