"""What the text of an option means, and how a default is written. Pure but for looking whether a file is there.

Each reader raises argparse's own error, so that a bad value is told with the name of its option.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsserver import origin, protocol

# How a default is written that is no word or number.
IN_WORDS: dict[Any, str] = {None: "auto", (): "none", "": "none", False: "off", True: "on"}


class Size(int):
    """A number of bytes, written as it is in an option."""

    def __str__(self) -> str:
        power = max(power for power in range(5) if self % 1024**power == 0)
        return f"{self // 1024**power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def written(value: Any) -> str:
    """Give a default as it would be written in an option."""
    return str(IN_WORDS.get(value, value))


def word(text: str) -> str:
    """Read a text, or none."""
    return "" if text == "none" else text


def word_or_auto(text: str) -> str | None:
    """Read a text, or auto."""
    return None if text == "auto" else text


def port(text: str) -> int:
    """Read a port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use 0 to 65535")
    return int(text)


def positive(text: str) -> int:
    """Read a number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def positive_or_auto(text: str) -> int | None:
    """Read a number of 1 or more, or auto."""
    return None if text == "auto" else positive(text)


def size(text: str) -> int:
    """Read a number of bytes, like 2GiB."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use a number with MB, GB, MiB or GiB, like 2GiB")
    base = 1024 if "i" in found[2] else 1000
    return int(float(found[1]) * base ** "BKMGT".index(found[2][0]))


def size_or_auto(text: str) -> int | None:
    """Read a number of bytes, or auto."""
    return None if text == "auto" else size(text)


def seconds(text: str) -> float:
    """Read a time that may be none."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; use 0 or more, like 2.5")
    return float(text)


def seconds_or_auto(text: str) -> float | None:
    """Read a time that may be none, or auto."""
    return None if text == "auto" else seconds(text)


def span(text: str) -> float:
    """Read a time that is one."""
    if not seconds(text):
        raise argparse.ArgumentTypeError("0 is too short; use a number of seconds over 0, like 2.5")
    return seconds(text)


def rate(text: str) -> float:
    """Read how often a second something may happen."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number over 0, like 10 or 0.5")
    return float(text)


def stretch(text: str) -> float:
    """Read by how much longer something may be."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more, like 3 or 2.5")
    return float(text)


def folder_or_auto(text: str) -> Path | None:
    """Read the name of a folder that is there, or auto."""
    if text == "auto":
        return None
    if not text or not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder; make it, and put models into it at <vendor>/<model>/")
    return Path(text)


def file(text: str) -> str:
    """Read the name of a file that is there, or none."""
    if text == "none":
        return ""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file")
    return text


def names(text: str) -> tuple[str, ...]:
    """Read names with commas between them, or none."""
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())


def origins(text: str) -> tuple[str, ...]:
    """Read the origins of pages, or none."""
    for name in names(text):
        if origin.normal_origin(name) is None:
            raise argparse.ArgumentTypeError(f"{name!r} is no origin; use one like https://chat.example.com, or null")
    return names(text)


def hosts(text: str) -> tuple[str, ...]:
    """Read hosts, with a port or without, or none."""
    for name in names(text):
        if not origin.is_host(name):
            raise argparse.ArgumentTypeError(f"{name!r} is no host; use one like chat.example.com or localhost:8080")
    return names(text)


def device(text: str) -> str:
    """Read where models run."""
    if not re.search(protocol.DEVICE, text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(protocol.CHOICES['device'])}")
    return text


def dtype(text: str) -> str:
    """Read a precision."""
    return _choice(text, protocol.CHOICES["dtype"])


def quantization(text: str) -> str:
    """Read a way to quantise."""
    return _choice(text, protocol.CHOICES["quantization"])


def switch(text: str) -> bool:
    """Read on or off."""
    return _choice(text, ("on", "off")) == "on"


def decode(text: str) -> str:
    """Read a way to decode."""
    return _choice(text, ("auto", "eager", "graph", "compiled"))


def client_loads(text: str) -> str:
    """Read which models clients may have loaded."""
    return _choice(text, ("off", "listed", "any"))


def log_level(text: str) -> str:
    """Read a level of the log."""
    return _choice(text, ("debug", "info", "warning", "error"))


def _choice(text: str, choices: Sequence[str]) -> str:
    # Not argparse's `choices`: those are not applied to a default, and so not to the environment.
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
    return text
