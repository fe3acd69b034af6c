"""What stands in a GGUF file: its metadata, and where its tensors lie. Knows no model, and neither torch nor numpy.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader makes arrays
of every single token: 10.8 s for Gemma 3's 262144 on two cores, where this takes 0.3 s.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct
from typing import Any

VERSIONS = (2, 3)
ALIGNMENT = 32  # where the file states no other
FREQUENCIES = "rope_freqs.weight"  # a tensor that says how positions turn
STRING, ARRAY = 8, 9
# How numbers may be packed: the name, how many share a block, and how many bytes that takes.
PACKINGS = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)},
    **{
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
    },
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82), 18: ("IQ3_XXS", 256, 98)},
    **{21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56), 20: ("IQ4_NL", 32, 18)},
    **{23: ("IQ4_XS", 256, 136), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17)},
}
# The other types of a value, as struct writes them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor in the file: its shape in torch's order, how its numbers are packed, and which bytes they are."""

    name: str
    shape: tuple[int, ...]
    packing: str
    block: int
    block_bytes: int
    offset: int

    @property
    def row_bytes(self) -> int:
        """How many bytes a row takes; rows are packed each by itself."""
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file's metadata and its tensors."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[PackedTensor, ...]

    @property
    def architecture(self) -> str:
        """The kind of model, by llama.cpp's name."""
        return str(self.metadata["general.architecture"])

    @property
    def weights(self) -> tuple[PackedTensor, ...]:
        """The tensors that are the model's weights."""
        return tuple(tensor for tensor in self.tensors if tensor.name != FREQUENCIES)

    @property
    def end(self) -> int:
        """How long a whole file is at least."""
        return max((tensor.offset + tensor.rows * tensor.row_bytes for tensor in self.tensors), default=0)

    def fact(self, name: str, default: Any = None) -> Any:
        """Give what the file says of its architecture's `name`."""
        return self.metadata.get(f"{self.architecture}.{name}", default)


class UnknownPacking(Exception):
    """A file's numbers are packed in a way that is not known here."""


def read(path: Path) -> GgufFile:
    """Read the metadata and the list of tensors; whether the tensors' own bytes are there is not looked at.

    Raises:
        ValueError: it is no GGUF file, or a damaged one.
        UnknownPacking: nobody here could unpack it.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _read(path, content)
        except UnknownPacking:
            raise
        except Exception as error:  # whatever a damaged header makes of it
            raise ValueError("damaged") from error


def _read(path: Path, content: mmap.mmap) -> GgufFile:
    reader = _Reader(content)
    magic, version, tensor_count, fact_count = reader.unpack("4sIQQ")
    if magic != b"GGUF" or version not in VERSIONS:
        raise ValueError(f"not a GGUF file of version {VERSIONS}")
    metadata = {}
    for _ in range(fact_count):
        name = reader.string()
        metadata[name] = reader.value(*reader.unpack("I"))
    found = [reader.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-reader.at // alignment) * alignment
    tensors = tuple(PackedTensor(name, shape, *packing, start + offset) for name, shape, packing, offset in found)
    if not isinstance(metadata["general.architecture"], str):
        raise ValueError("no architecture")
    return GgufFile(path, metadata, tensors)


class _Reader:
    """Takes one value after the other out of the file's header."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.at = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        struct = Struct("<" + layout)
        values = struct.unpack_from(self._content, self.at)
        self.at += struct.size
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        end = self.at + length
        if end > len(self._content):
            raise ValueError("a string ends beyond the file")
        text = self._content[self.at : end].decode()
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.unpack("IQ")
            return (
                [self.string() for _ in range(count)]
                if element == STRING
                else list(self.unpack(f"{count}{SCALARS[element]}"))
            )
        return self.unpack(SCALARS[kind])[0]

    def tensor(self) -> tuple[str, tuple[int, ...], tuple[str, int, int], int]:
        name, (dimensions,) = self.string(), self.unpack("I")
        shape = self.unpack(f"{dimensions}Q")[::-1]
        packing, offset = self.unpack("IQ")
        if packing not in PACKINGS:
            raise UnknownPacking
        return name, shape, PACKINGS[packing], offset
