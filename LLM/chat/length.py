"""Finds out early that a text has more tokens than fit, without encoding all of it. Knows no model families."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer

from LLM.chat.reading import reading

PIECE = 16_384  # characters that are encoded at once
CUT_WITHIN = 256  # characters at a piece's end in which it is cut before a space, if there is one
# By how many tokens a cut may change a text's count: what is cut is a word, and of a word of more than 100 characters
# WordPiece makes one token.
SLACK = 128
# What keeps every character, and makes a token of no more of them than it has itself.
KEEPING = {"ByteLevel", "Metaspace", "Digits", "Prepend", "Split", "Replace", "Sequence"}


def check_text(text: str, count: Callable[[str], int], longest: int | None, spaces_vanish: bool) -> None:
    """Encode a text's pieces until they show that it cannot fit; `longest` is how many characters a token may stand for.

    Where `spaces_vanish`, a run of spaces counts as one: beside a token that was cut it may be none at all.

    Raises:
        Refused: `context_length_exceeded`.
        Unwanted: nobody waits for it any more.
    """
    bounds = reading()
    if longest:
        bounds.check_length(-(-len(text) // longest))
    if len(text) <= bounds.limit:
        return
    at_least = 0
    for piece in _pieces(text):
        tokens = count(" ".join(piece.split()) if spaces_vanish else piece)
        bounds.made(tokens)
        at_least += tokens - SLACK
        bounds.check_length(at_least)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE
        space = text.rfind(" ", end - CUT_WITHIN, end) if end < len(text) else -1
        end = space if space > 0 else end
        yield text[start:end]
        start = end


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Return how many characters of a text one token may stand for; None where that has no bound that is known."""
    parts = [_state(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part is not None]
    if spaces_vanish(tokenizer) or not _knows_all(tokenizer.model, parts) or not all(map(_keeps, parts)):
        return None
    return max(map(len, tokenizer.get_vocab()), default=None)


def spaces_vanish(tokenizer: Tokenizer) -> bool:
    """Return whether an added token takes any number of spaces beside it along."""
    return any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())


def _knows_all(model: Any, parts: list[dict[str, Any]]) -> bool:
    """Whether no character is left out, or one with its neighbours, because the vocabulary has no token for it."""
    if type(model).__name__ != "BPE":
        return False
    return model.byte_fallback or (model.unk_token and not model.fuse_unk) or '"ByteLevel"' in json.dumps(parts)


def _state(part: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__())  # what pickle would take
    return state


def _keeps(state: dict[str, Any]) -> bool:
    if state["type"] not in KEEPING or state.get("behavior") == "Removed":
        return False
    if state["type"] == "Replace":
        pattern = state["pattern"].get("String")
        return pattern is not None and len(pattern) <= len(state["content"])
    return all(map(_keeps, [*state.get("normalizers", ()), *state.get("pretokenizers", ())]))
