"""The weights of a GGUF file, each unpacked when it is asked for, in the order of rows that transformers has.

Only a part of a tensor is held as it was packed at any time, so that a load takes little more than the model itself.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import torch

from LLM._base_model_handler import Progress
from LLM.gguf_config import names_of
from LLM.gguf_file import GgufFile, PackedTensor
from LLM.loading.steady_file import SteadyFile, check_unchanged
from LLM.stored_weights import Reading

PART = 1 << 22  # numbers that are unpacked at once; unpacking takes several times their memory


class PackedWeight:
    """A tensor that is still in its file; to index it is to unpack it, as `StoredWeight` is read."""

    def __init__(self, tensor: PackedTensor, name: str, weights: "PackedWeights") -> None:
        self._tensor = tensor
        self._name = name
        self._weights = weights

    def __getitem__(self, index: Any) -> torch.Tensor:
        unpacked = self._weights.unpack(self._tensor)
        self._weights.reading.has_read(self._name)
        return unpacked[index]


class PackedWeights:
    """What the tensors of a file have in common."""

    def __init__(self, file: GgufFile, opened: SteadyFile, config: Any, dtype: torch.dtype, reading: Reading) -> None:
        self.reading = reading
        self._file = file
        self._opened = opened
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._dtype = dtype

    def unpack(self, tensor: PackedTensor) -> torch.Tensor:
        """Give a tensor as transformers has it."""
        # Small ones are added to in the precision they come in.
        dtype = self._dtype if len(tensor.shape) > 1 else torch.float32
        unpacked = torch.empty(tensor.shape, dtype=dtype)
        rows, width = unpacked.view(tensor.rows, tensor.shape[-1]), tensor.row_bytes
        step = max(1, PART // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            part = rows[start : start + step]
            packed = torch.empty(len(part), width, dtype=torch.uint8)
            self._opened.read_into(packed.view(-1).numpy().data, tensor.offset + start * width)
            part.copy_(_dequantised(packed, tensor.packing))
        return self._as_in_transformers(tensor.name, unpacked).to(self._dtype)

    def _as_in_transformers(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Undo what llama.cpp's conversion changes: the order of Llama's rotated rows, and the 1 in Gemma's norms."""
        if self._file.architecture == "gemma3" and name.endswith("norm.weight"):
            return tensor - 1
        for part, count in zip((".attn_q.", ".attn_k."), self._heads, strict=True):
            if self._file.architecture == "llama" and part in name:
                return tensor.view(count, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor


@contextmanager
def packed_weights(
    file: GgufFile, config: Any, dtype: torch.dtype, quantised: Collection[str], progress: Progress
) -> Iterator[dict[str, PackedWeight]]:
    """Give a file's weights by transformers' names; progress is by the bytes that were read, as with safetensors."""
    names = names_of(file)
    reading = Reading({names[tensor.name]: tensor.rows * tensor.row_bytes for tensor in file.weights}, quantised, progress)
    with SteadyFile(file.path, file.version) as opened:
        weights = PackedWeights(file, opened, config, dtype, reading)
        yield {names[tensor.name]: PackedWeight(tensor, names[tensor.name], weights) for tensor in file.weights}
        check_unchanged([(file.path, file.version)])
        reading.end()


def _dequantised(packed: torch.Tensor, packing: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[packing]))
