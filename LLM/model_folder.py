"""What a model folder holds, read without loading it: its configuration, its weights' files, their sizes and types.

Every reason to refuse a folder that can be seen from outside is here. Knows neither torch nor transformers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

from LLM import gguf_config, gguf_file
from LLM.errors import Refused

# Bytes of an element, by safetensors' names: https://huggingface.co/docs/safetensors/index#format.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
ELEMENT_BYTES = {**FLOAT_BYTES, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# Of a linear layer's weights; those of 4 bits share a scale of 4 bytes among 64.
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HEADER_SIZE = Struct("<Q")
LARGEST_HEADER = 100_000_000  # safetensors' own bound


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: its element's type by safetensors' name, and how many elements it has."""

    name: str
    element: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many elements it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """What it takes in its file."""
        return self.count * ELEMENT_BYTES[self.element]

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer's weight, which a quantisation makes smaller; embeddings and the output stay."""
        return len(self.shape) == 2 and "embed" not in self.name and "lm_head" not in self.name


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder in the usual Hugging Face layout, with weights as safetensors, or of one GGUF file, which may stand alone."""

    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: tuple[StoredTensor, ...]
    gguf: gguf_file.GgufFile | None = None

    @property
    def family(self) -> str:
        """The architecture's short name."""
        return str(self.config["model_type"])

    @property
    def dtype(self) -> str | None:
        """The precision that the makers chose, by torch's name, if the configuration tells."""
        for config in (self.config, self.config.get("text_config") or {}):
            if own := config.get("dtype") or config.get("torch_dtype"):
                return str(own)
        return None

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(tensor.count for tensor in self.tensors if tensor.element in FLOAT_BYTES)

    @property
    def file_bytes(self) -> int:
        """What the weights take on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def tied(self) -> int:
        """How many numbers the embedding table has that is the output layer too; 0 if they are two."""
        if any("lm_head" in tensor.name for tensor in self.tensors):
            return 0
        return sum(tensor.count for tensor in self.tensors if "embed_tokens" in tensor.name)

    def memory(self, dtype: str, quantization: str = "none") -> int:
        """Give the bytes that the weights take at a precision, which is that of what is not quantised."""
        linear = sum(tensor.count for tensor in self.tensors if tensor.is_linear) if quantization != "none" else 0
        quantised = linear * QUANTIZED_BYTES.get(quantization, 0)
        return int(quantised + (self.parameters - linear) * DTYPE_BYTES[dtype])


def read(folder: Path) -> ModelFolder:
    """Read what there is to know of a folder.

    Raises:
        Refused: `load_failed`, with what is wrong and what to do, in words fit for any client.
    """
    if not next(folder.glob("*.safetensors"), None) and (packed := sorted(folder.glob("*.gguf"))):
        return _of_gguf(folder, packed)
    config = _config(folder)
    files = _files(folder)
    return ModelFolder(config, files, tuple(tensor for file in files for tensor in _tensors(file)))


def _of_gguf(folder: Path, files: Sequence[Path]) -> ModelFolder:
    """Read a folder of one GGUF file; its own configuration counts more than what the file says."""
    if len(files) > 1:
        raise _refused(f"it holds {len(files)} GGUF files; leave the one that is to be loaded")
    try:
        found = gguf_file.read(files[0])
    except gguf_file.UnknownPacking as error:
        raise _refused(
            "its GGUF file is packed in a way that is not known here; take one that is packed otherwise"
        ) from error
    except (OSError, ValueError) as error:
        raise _refused("its GGUF file is damaged; copy it anew") from error
    if found.metadata.get("split.count", 1) not in (0, 1):
        raise _refused("its GGUF file is one of several; join them with llama-gguf-split --merge")
    if files[0].stat().st_size < found.end:
        raise _refused("its GGUF file ends too early; copy it anew")
    names = gguf_config.names_of(found)
    config = _config(folder) if (folder / "config.json").exists() else gguf_config.config_of(found)
    config = {"dtype": gguf_config.dtype_of(found), **config}
    # Unpacked, all of them are floats.
    tensors = [StoredTensor(names[tensor.name], "F32", tensor.shape) for tensor in found.weights]
    return ModelFolder(config, tuple(files), tuple(tensors), found)


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused("its config.json cannot be read; copy it anew") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _refused("its config.json names no model_type; take the one that came with the weights")
    if config.get("quantization_config"):
        raise _refused(
            "its weights are quantised already; take the model's own, which can be quantised while they are loaded"
        )
    return config


def _files(folder: Path) -> tuple[Path, ...]:
    """Give the weights' files: those that the index names, or the one of the usual name, or else all there are.

    Some makers put the same weights beside them once more, in a layout of their own.
    """
    there = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    if not there:
        if any(next(folder.glob(pattern), None) for pattern in PICKLED):
            raise _refused("its weights are pickled, and loading those could run any code; convert them to safetensors")
        raise _refused("it holds no safetensors file, and no GGUF file; copy the model's weights into it")
    named = _named_by_index(folder) or ({"model.safetensors"} & there.keys()) or there.keys()
    if missing := named - there.keys():
        raise _refused(f"{len(missing)} of the weights' files are missing; copy them all")
    return tuple(there[name] for name in sorted(named))


def _named_by_index(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused("the index of its weights cannot be read; copy it anew") from error


def _tensors(file: Path) -> Iterator[StoredTensor]:
    try:
        with file.open("rb") as opened:
            (size,) = HEADER_SIZE.unpack(opened.read(HEADER_SIZE.size))
            header = json.loads(opened.read(min(size, LARGEST_HEADER)))
        header.pop("__metadata__", None)
        ends = [HEADER_SIZE.size + size + tensor["data_offsets"][1] for tensor in header.values()]
        tensors = [StoredTensor(name, tensor["dtype"], tuple(tensor["shape"])) for name, tensor in header.items()]
    except Exception as error:  # whatever a damaged header makes of it
        raise _refused("one of the weights' files is damaged; copy it anew") from error
    if file.stat().st_size < max(ends, default=0):
        raise _refused("one of the weights' files ends too early; copy it anew")
    yield from tensors


def _refused(why: str) -> Refused:
    return Refused("load_failed", f"the model's folder cannot be loaded: {why}")
