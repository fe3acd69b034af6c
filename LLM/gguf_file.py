"""What stands in a GGUF file: its metadata, and where its tensors lie. Knows no model, and neither torch nor numpy.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader makes arrays
of every single token: 10.8 s for Gemma 3's 262144 on two cores, where this takes 0.3 s.
"""

import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct
from typing import Any, overload

from LLM.loading.steady_file import SteadyFile, Version

VERSIONS = (2, 3)
ALIGNMENT = 32  # where the file states no other
FREQUENCIES = "rope_freqs.weight"  # a tensor that says how positions turn
STRING, ARRAY = 8, 9
LARGEST_HEADER = 128 << 20  # bytes; that of a vocabulary of 262144 tokens takes some 10 MiB
PIECE = 1 << 20  # bytes of the header that are read at once
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
    version: Version
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


class Texts(Sequence[str]):
    """Strings as the file has them, each decoded when it is asked for: as Python's own they take several times as much."""

    def __init__(self, content: bytes, ends: "array[int]") -> None:
        self._content = content
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index]  # which is where an index out of range is refused
        place = index % len(self._ends)
        return self._content[self._ends[place - 1] if place else 0 : end].decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends:
            yield self._content[start:end].decode()
            start = end


def read(file: SteadyFile) -> GgufFile:
    """Read a file's metadata and the places of its tensors.

    Raises:
        UnknownPacking: one of its tensors cannot be unpacked here.
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        return _read(file)
    except (UnknownPacking, OSError):
        raise
    except Exception as error:  # whatever a damaged header makes of it
        raise ValueError("damaged") from error


def _read(file: SteadyFile) -> GgufFile:
    reader = _Reader(file)
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
    return GgufFile(file.path, file.version, metadata, tensors)


class _Reader:
    """Takes one value after the other out of the file's header, which is read in pieces."""

    def __init__(self, file: SteadyFile) -> None:
        self._file = file
        self._size = min(file.version.size, LARGEST_HEADER)
        self._piece, self._piece_at = b"", 0
        self.at = 0

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        if size > self._size - self.at:
            raise ValueError("the header ends beyond the file")
        start = self.at - self._piece_at
        if start + size > len(self._piece):
            self._piece_at, start = self.at, 0
            self._piece = self._file.read(min(max(size, PIECE), self._size - self.at), self.at)
        self.at += size
        return self._piece[start : start + size]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        struct = Struct("<" + layout)
        return struct.unpack(self.take(struct.size))

    def string(self) -> str:
        return self.take(*self.unpack("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.unpack("IQ")
            return self._texts(count) if element == STRING else self._numbers(SCALARS[element], count)
        return self.unpack(SCALARS[kind])[0]

    def _texts(self, count: int) -> Texts:
        content, ends = bytearray(), array("I")
        for _ in range(count):
            text = self.take(int.from_bytes(self.take(8), "little"))
            text.decode()  # so that one that is none is found now
            content += text
            ends.append(len(content))
        return Texts(bytes(content), ends)

    def _numbers(self, layout: str, count: int) -> "array[Any]":
        # A truth is a byte; Python's arrays know no such type.
        numbers = array("B" if layout == "?" else layout)
        numbers.frombytes(self.take(count * numbers.itemsize))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def tensor(self) -> tuple[str, tuple[int, ...], tuple[str, int, int], int]:
        name, (dimensions,) = self.string(), self.unpack("I")
        shape = self.unpack(f"{dimensions}Q")[::-1]
        packing, offset = self.unpack("IQ")
        if packing not in PACKINGS:
            raise UnknownPacking
        return name, shape, PACKINGS[packing], offset
