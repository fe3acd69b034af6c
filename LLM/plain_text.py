"""Makes token ids of a conversation so that nothing written in a message becomes a control token. Knows no roles.

A control token is one that the tokenizer marks as special: `<|eot_id|>` ends a turn, and whoever could write it into a
message could write the next turn as well.
"""

import json
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from LLM.chat.length import PIECE, check_text, longest_token, spaces_vanish
from LLM.chat.reading import reading
from LLM.errors import Refused


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, by its text."""

    text: str


BATCH = 256  # pieces that are encoded at once, if they are short

# A string is text, whatever stands in it.
Piece = Control | str


class PlainText:
    """A twin of a tokenizer whose control tokens have names that nobody can guess: their usual texts are only text to it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        secret = secrets.token_hex(8)
        self._ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._names = {text: f"{secret}c{i}x" for i, text in enumerate(self._ids)}
        # Not the names' secret: a template may show these words to the client, in an error.
        word = secrets.token_hex(8)
        self._word, self._words = f"{word}w%dx", re.compile(rf"{word}w(\d{{1,9}})x")
        self._twin = _twin(tokenizer, self._names)
        # The twin gives added tokens other ids where the tokenizer's own are not in a row.
        twins = {i: token.content for i, token in self._twin.get_added_tokens_decoder().items()}
        real = {self._names.get(token.content, token.content): i for i, token in added.items()}
        self._real_ids = {i: real[content] for i, content in twins.items() if i != real[content]}
        self._finder = _finder(self._ids)
        self._any = re.compile("|".join(map(re.escape, self._ids)) or r"(?!)")
        self._starts = _Parts({text[:n] for text in self._ids for n in range(1, len(text))}, {t[0] for t in self._ids if t})
        self._ends = _Parts({text[n:] for text in self._ids for n in range(1, len(text))}, {t[-1] for t in self._ids if t})
        # How many characters a token may stand for, and whether spaces may stand for none.
        self.longest_token = longest_token(tokenizer)
        self.spaces_vanish = spaces_vanish(tokenizer)
        # SentencePiece begins every text with a space of its own, Metaspace only one that has none yet.
        self._space = " " if self._written("a") == self._written(" a") == "▁a" else ""

    def encode(self, pieces: Iterable[Piece]) -> list[int]:
        """Give the ids of pieces, each text encoded by itself, as the makers of models do.

        Raises:
            Refused: `unsupported` for a control token that the tokenizer does not have.
        """
        ids: list[int] = []
        for batch in _batches(pieces):
            reading().check_length(len(ids))
            ids += self._encode_batch(batch)
            reading().made(len(ids) - reading().tokens)
        return ids

    def _encode_batch(self, pieces: Sequence[Piece]) -> list[int]:
        written = [self._space + piece if piece else piece for piece in pieces if isinstance(piece, str)]
        for text in written:
            check_text(text, self._count, self.longest_token, self.spaces_vanish)
        texts, ids = iter(self._encode(written)), list[int]()
        for piece in pieces:
            if isinstance(piece, str):
                ids += next(texts)
            elif piece.text in self._ids:
                ids.append(self._ids[piece.text])
            else:
                message = f"this model's tokenizer has no {piece.text}, which its format needs; send prompt instead"
                raise Refused("unsupported", message, "messages")
        return ids

    def hide(self, text: str, hidden: list[str]) -> str:
        """Give a text with a word in place of each control token; `hidden` learns what the words stand for.

        What could be a part of one at either end is hidden too: what comes next in the prompt could complete it.
        """
        body = text.strip()
        if not body:
            return text
        left = text.index(body)
        start = self._ends.longest_at_start(body)
        end = self._starts.longest_at_end(body[start:])
        if not (start or end or self._any.search(body)):
            return text
        right = len(body) - end
        middle = "".join(self._hide(part, hidden) if control else part for part, control in self._split(body[start:right]))
        first, last = self._hide(body[:start], hidden), self._hide(body[right:], hidden)
        return text[:left] + first + middle + last + text[left + len(body) :]

    def encode_prompt(self, prompt: str, hidden: Sequence[str]) -> list[int]:
        """Give the ids of a whole prompt: what was hidden from it is text, any other control token is one."""
        parts = self._split(prompt)
        controls = sum(control for _, control in parts)
        reading().made(controls)
        reading().check_length(controls)
        named = "".join(self._names[part] if control else part for part, control in parts)
        shown = self._words.sub(lambda word: hidden[int(word[1])] if int(word[1]) < len(hidden) else "", named)
        check_text(shown, self._count, None, self.spaces_vanish)
        return self._encode([shown])[0]

    def _hide(self, part: str, hidden: list[str]) -> str:
        if not part:
            return part
        hidden.append(part)
        return self._word % (len(hidden) - 1)

    def _split(self, text: str) -> list[tuple[str, bool]]:
        """Cut a text at its control tokens, and say of each part whether it is one."""
        found = self._finder.encode_batch([text], add_special_tokens=False)[0]
        return [(text[a:b], token_id > 0) for token_id, (a, b) in zip(found.ids, found.offsets, strict=True)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Not `encode`: it keeps every other thread from running.
        encoded = self._twin.encode_batch(list(texts), add_special_tokens=False)
        if not self._real_ids:
            return [each.ids for each in encoded]
        return [[self._real_ids.get(i, i) for i in each.ids] for each in encoded]

    def _count(self, text: str) -> int:
        return len(self._twin.encode_batch([text], add_special_tokens=False)[0])

    def _written(self, text: str) -> str:
        return "".join(self._twin.encode(text, add_special_tokens=False).tokens)


class _Parts:
    """The beginnings of all control tokens, or their ends; each holds one of a few characters."""

    def __init__(self, known: Collection[str], marks: set[str]) -> None:
        self._known = known
        self._marks = marks
        self._longest = max(map(len, known), default=0)

    def longest_at_start(self, text: str) -> int:
        """Return how long the longest of them is with which a text begins, 0 if there is none."""
        text = text[: self._longest]
        if self._marks.isdisjoint(text):
            return 0
        return next((n for n in range(len(text), 0, -1) if text[:n] in self._known), 0)

    def longest_at_end(self, text: str) -> int:
        """Return how long the longest of them is with which a text ends, 0 if there is none."""
        text = text[-self._longest :] if self._longest else ""
        if self._marks.isdisjoint(text):
            return 0
        return next((n for n in range(len(text), 0, -1) if text[-n:] in self._known), 0)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece) if isinstance(piece, str) else 1
        if len(batch) >= BATCH or size >= PIECE:
            yield batch
            batch, size = [], 0
    yield batch


def _finder(controls: Iterable[str]) -> Tokenizer:
    """Make a tokenizer whose token 0 is any text, and the others control tokens: it finds them as every tokenizer does."""
    finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    finder.add_special_tokens([AddedToken(text, normalized=False) for text in controls])
    return finder


def _twin(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    twin = Tokenizer(_model(tokenizer, names))
    if tokenizer.normalizer is not None:
        twin.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        twin.pre_tokenizer = tokenizer.pre_tokenizer
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    twin.add_tokens([token for token in added if not token.special])
    twin.add_special_tokens(
        [AddedToken(names[t.content], lstrip=t.lstrip, rstrip=t.rstrip, normalized=False) for t in added if t.special]
    )
    return twin


def _model(tokenizer: Tokenizer, names: Mapping[str, str]) -> Any:
    """Give the tokenizer's model, without a way from text to a control token.

    Where its text alone does not become one, no longer text does: what a model makes of a part that it keeps apart from the
    rest is what it makes of that part alone.
    """
    if not any(text in [token.value for token in tokenizer.model.tokenize(text)] for text in names):
        return tokenizer.model
    state = json.loads(tokenizer.to_str())["model"]
    if isinstance(state["vocab"], list):
        state["vocab"] = [[names.get(piece, piece), score] for piece, score in state["vocab"]]
    else:
        state["vocab"] = {names.get(piece, piece): i for piece, i in state["vocab"].items()}
    if "merges" in state:
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["merges"]]
        state["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    if "unk_token" in state:
        state["unk_token"] = names.get(state["unk_token"], state["unk_token"])
    return Tokenizer.from_str(json.dumps({"version": "1.0", "model": state, "added_tokens": []})).model
