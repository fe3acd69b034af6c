"""Which files of a hub's repository make a model folder: chosen by name, before a byte of them moves. Knows no network.

Weights that are plain numbers, never pickles or code; one set of them where a repository holds several.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
GGUF_PART = re.compile(r"-[0-9]{5}-of-[0-9]{5}(?=\.gguf$)")
# Compared in lower case.
BESIDE_THE_WEIGHTS = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "tokenizer.model.v*", "*.tiktoken"),
    *("licen[cs]e", "licen[cs]e.md", "licen[cs]e.txt", "notice*", "use_policy.md", "readme.md"),
)


class NotFetched(Exception):
    """A model that was not fetched; the message says why and what to do, in one line."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: its path there, its bytes, and the digest that the hub states.

    The digest is the SHA-256 of a large file, git's blob id of a small one.
    """

    path: str
    size: int
    digest: str

    @property
    def name(self) -> str:
        """Its name in a model folder, which has no folders in it."""
        return PurePosixPath(self.path).name

    @property
    def at_the_top(self) -> bool:
        """Whether it lies in the repository's own folder: those below it hold copies in other layouts."""
        return self.name == self.path

    def is_copied_by(self, file: Path) -> bool:
        """Whether a local file has this one's bytes."""
        if file.stat().st_size != self.size:
            return False
        with file.open("rb") as opened:
            if len(self.digest) == 64:
                return hashlib.file_digest(opened, "sha256").hexdigest() == self.digest
            blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
            return hashlib.file_digest(opened, lambda: blob).hexdigest() == self.digest


def choose(files: Sequence[HubFile], named: str | None = None) -> list[HubFile]:
    """Choose what to download, the small files first; `named` is the GGUF file to take, if there are several.

    Raises:
        NotFetched: there are no weights that can be taken, or it has to be said which.
    """
    ggufs = [file for file in files if file.path.endswith(".gguf")]
    weights = [] if named else _safetensors([file for file in files if file.at_the_top])
    if not weights and not (ggufs or named):
        raise NotFetched(
            "it has no safetensors or GGUF weights in the usual layout, and no other ones are loaded; "
            "look for a repository of the same model that has"
        )
    beside = [
        file for file in files if file.at_the_top and any(fnmatchcase(file.name.lower(), p) for p in BESIDE_THE_WEIGHTS)
    ]
    if weights and "config.json" not in [file.name for file in beside]:
        raise NotFetched("it has no config.json, so it is no model of its own; an adapter cannot be served")
    return beside + (weights or _gguf(ggufs, named))


def _safetensors(files: Sequence[HubFile]) -> list[HubFile]:
    """Give the weights in the Hugging Face layout: the shards and their index, or the one file, or what else there is."""
    there = {file.name: file for file in files if file.name.endswith(".safetensors")}
    shards = [file for name, file in there.items() if SHARD.fullmatch(name)]
    index = [file for file in files if file.name == INDEX]
    if shards and index:
        return index + shards
    if "model.safetensors" in there:
        return [there["model.safetensors"]]
    # The makers' own layout, which Mistral puts beside the other one.
    others = [file for name, file in there.items() if not name.startswith(("consolidated", "adapter_"))]
    return index + others if others else []


def _gguf(files: Sequence[HubFile], named: str | None) -> list[HubFile]:
    """Give the one GGUF file, or that which was named; a file in parts is one."""
    wholes: dict[str, list[HubFile]] = {}
    for file in files:
        wholes.setdefault(GGUF_PART.sub("", file.path), []).append(file)
    found = [parts for parts in wholes.values() if named in (None, *(part.path for part in parts))]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(f"{parts[0].path} ({size(sum(part.size for part in parts))})" for parts in wholes.values())
    if found:
        raise NotFetched(f"it has several GGUF files; choose one with --file: {shown}")
    raise NotFetched(f"it has no GGUF file {named!r}; " + (f"choose one of {shown}" if shown else "leave --file out"))


def size(count: int) -> str:
    """Write a number of bytes for people."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} bytes"
