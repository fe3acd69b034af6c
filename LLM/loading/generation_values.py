"""The defaults that a generation_config.json states, of which those are taken that this server could be asked for too.

A bad one is ignored with a note: the model itself is whole, and a client may state its own.
"""

import math
from collections.abc import Mapping
from typing import Any

# From what to what, both within; as wsserver's protocol has them for clients.
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_p": (math.nextafter(0, 1), 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.1, 10),
}
WHOLE = {"top_k"}


def checked(stated: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """Return the sampling defaults and `eos_token_id`, a list of ids or None, and a note for each that is ignored."""
    notes: list[str] = []
    values: dict[str, Any] = {}
    for name, (least, most) in RANGES.items():
        value = stated.get(name)
        if value is None:
            continue
        if _is_number(value, name in WHOLE) and least <= value <= most:
            values[name] = value
        else:
            notes.append(f"ignores {name} of its generation_config.json, which is no number that can be used")
    values["eos_token_id"], bad = _end_ids(stated.get("eos_token_id"), vocabulary)
    if bad:
        notes.append("ignores an eos_token_id of its generation_config.json, which is no token of the model")
    return values, notes


def _is_number(value: object, whole: bool) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _end_ids(stated: object, vocabulary: int) -> tuple[list[int] | int | None, bool]:
    if stated is None:
        return None, False
    ids = stated if isinstance(stated, list) else [stated]
    good = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocabulary]
    bad = len(good) < len(ids)
    if isinstance(stated, list):
        return good or None, bad
    return (good[0] if good else None), bad
