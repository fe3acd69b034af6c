"""What a hostile client says: valid messages, changed ones, damaged ones, and anything at all. Pure: drawn from a seed."""

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec

from tests.conftest import ECHO
from wsserver.protocol import CHOICES, CLIENT_TYPES

Draw = random.Random

KEY = "sesame"  # the one key that lets in who has shown none
# Where an id and a token stand with which something may be resumed; whoever says the text knows them.
RESUMED_ID, RESUME_TOKEN = "<id>", "<token>"
IDS = ("a", "b", "c", "auto-1", "é😀", "i" * 128, "\r\n\x1b[2J", "__class__")
FIELDS = {kind: [field.name for field in msgspec.structs.fields(message)] for kind, message in CLIENT_TYPES.items()}
ANY_FIELD = sorted({"type", *(field for fields in FIELDS.values() for field in fields)})
# What some fields may well hold.
PLAUSIBLE: dict[str, list[Any]] = {
    **{field: [*choices] for field, choices in CHOICES.items()},
    "model": [ECHO, "no/such"],
    "stop": ["p", "pp", ["c", "p" * 9]],
    "stop_token_ids": [[ord("p")], [ord("c"), 5]],
    "logit_bias": [{"5": 1.5}, {str(ord("q")): 100}],
    "temperature": [0, 0.5, 10],
    "top_p": [0.5, 1],
    "min_p": [0, 0.1],
    "top_k": [0, 1, 40],
    "repetition_penalty": [0.1, 1.5],
    "presence_penalty": [-2, 0.5],
    "frequency_penalty": [-0.5, 2],
    "seed": [0, 7],
    "min_tokens": [0, 3, 64, 65],
    "max_tokens": [1, 64, 65],
    "stream": [True, False],
    "ignore_eos": [True, False],
    "resumable": [True, False],
    "after_seq": [0, 1, 7],
}
# What a field may hold instead of what it should.
NUMBERS = [0, -1, 1, 20, 21, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 1e-320, 1e308]
TEXTS = ["", " ", "\0", "x", "i" * 129, "x" * 257, "y" * 5000, "\ud800", "{{ 7 * 7 }}", "../../x", ".*", "auto", "int8", KEY]
LISTS: list[Any] = [[], [[]], [None], ["s"] * 17, [-1], [2**31], list(range(65)), [{"role": "user", "content": "x"}]]
OBJECTS: list[Any] = [{}, {"": None}, {"1": 1}, {"1": 1000}, {"x": 1}]
TURNS: list[Any] = [[{"role": "wizard", "content": "x"}], [{"role": "user"}], [[{"role": "user"}]]]
JUNK: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *LISTS, *OBJECTS, *TURNS]


def life(draw: Draw, frames: int) -> list[str]:
    """Give so many text frames, which one connection says; now and then nothing but nonsense."""
    if draw.random() < 0.1:
        return [anything("", draw) for _ in range(frames)]
    return [mutated(draw) for _ in range(frames)]


def valid(draw: Draw) -> dict[str, Any]:
    """Give a message as a client means it."""
    id = {"id": draw.choice(IDS)} if draw.random() < 0.8 else {}
    match draw.randrange(8):
        case 0 | 1 | 2:
            options = {"max_tokens": draw.randint(1, 64), "logprobs": draw.randint(0, 3), "resumable": True, "stream": False}
            some = dict(draw.sample(sorted(options.items()), draw.randint(0, 4)))
            return {"type": "generate", **id, "prompt": "p" * draw.randint(1, 80), **some}
        case 3:
            roles = draw.choices(["system", "user", "assistant"], k=draw.randint(1, 4))
            return {"type": "generate", **id, "messages": [{"role": role, "content": "c"} for role in roles]}
        case 4:
            return {"type": "cancel", **id}
        case 5:
            return {"type": "resume", "id": RESUMED_ID, "resume_token": RESUME_TOKEN, "after_seq": draw.randint(0, 5)}
        case 6:
            return {"type": "init", **id, "model": ECHO, **({"token": KEY} if draw.random() < 0.5 else {})}
    return {"type": "status"}


def mutated(draw: Draw) -> str:
    """Give a text frame: a valid message, one that was changed in some places, or one that was damaged too."""
    message = valid(draw)
    for _ in range(draw.choice((0, 0, 1, 1, 1, 2, 5))):
        known = FIELDS.get(str(message.get("type")), ANY_FIELD)
        field = draw.choice(draw.choice((ANY_FIELD, [*message, "id"], [*known, "type"])))
        if draw.random() < 0.15:
            message.pop(field, None)
        else:
            message[field] = draw.choice(PLAUSIBLE.get(field, JUNK) if draw.random() < 0.5 else JUNK)
    text = json.dumps(message, ensure_ascii=draw.random() < 0.8 or "\ud800" in str(message))
    for _ in range(draw.choice((0, 0, 0, 0, 1, 2))):
        text = draw.choice(DAMAGES)(text, draw)
    return text


def anything(text: str, draw: Draw) -> str:
    """Give characters at random."""
    return "".join(chr(draw.choice((draw.randrange(0x80), draw.randrange(0xE000, 0x10FFFF)))) for _ in range(20))


def _nested(text: str, draw: Draw) -> str:
    depth = draw.choice((1, 62, 63, 64, 65, 1000, 1025, 100_000))
    opening, closing = draw.choice((("[", "]"), ('{"x":', "}")))
    return text.replace("}", f',"deep":{opening * depth}1{closing * depth}}}', 1)


def _garbled(text: str, draw: Draw) -> str:
    place = draw.randrange(len(text) + 1)
    some = draw.choice(['"', "\\", "{", "]", "\0", "\x7f", ",", "é", "😀", "\u2028", "1e999", "NaN"])
    return text[:place] + some + text[place:]


def _with_a_key_twice(text: str, draw: Draw) -> str:
    return text.replace("}", f',"{draw.choice(ANY_FIELD)}":{json.dumps(draw.choice(JUNK))}}}', 1)


DAMAGES: tuple[Callable[[str, Draw], str], ...] = (
    _nested,
    _garbled,
    _with_a_key_twice,
    anything,
    lambda text, draw: text[: draw.randrange(len(text) + 1)],
    lambda text, draw: text * 2,
    lambda text, draw: text.replace("1", draw.choice(["1" * 400, "1e400", "-0", "1.", "0x1", "1e-400"])),
)
