"""What a model folder holds, read without loading it: its configuration, its weights' files, their sizes and types.

Every reason to refuse a folder that can be seen from outside is here. Knows neither torch nor transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

from LLM import gguf_config, gguf_file
from LLM.errors import Refused
from LLM.loading import plausible
from LLM.loading.steady_file import SteadyFile, Version, shown

# Bytes of an element, by safetensors' names: https://huggingface.co/docs/safetensors/index#format.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
ELEMENT_BYTES = {**FLOAT_BYTES, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# Of a linear layer's weights; those of 4 bits share a scale of 4 bytes among 64.
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HEADER_SIZE = Struct("<Q")
LARGEST_HEADER = 100_000_000  # safetensors' own bound
LARGEST_CONFIG = 10_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor: its element's type by safetensors' name, its shape, which of the files it is in, and at which byte."""

    name: str
    element: str
    shape: tuple[int, ...]
    file: int = 0
    offset: int = 0

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
    # Which content of its files this tells of: those of the weights, in their order, and then the others.
    versions: tuple[tuple[Path, Version], ...] = ()

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
        return sum(version.size for _, version in self.versions[: len(self.files)])

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
        found = _of_gguf(folder, packed)
    else:
        found = _of_safetensors(folder)
    plausible.check(found.config, found.tensors)
    return found


def _of_safetensors(folder: Path) -> ModelFolder:
    config, versions = _config(folder)
    files = _files(folder)
    tensors: list[StoredTensor] = []
    known: list[tuple[Path, Version]] = []
    for number, path in enumerate(files):
        with open_inside(folder, path) as file:
            tensors += _tensors(file, number)
            known.append((path, file.version))
    return ModelFolder(config, files, tuple(tensors), None, (*known, *versions))


def _of_gguf(folder: Path, files: Sequence[Path]) -> ModelFolder:
    """Read a folder of one GGUF file; its own configuration counts more than what the file says."""
    if len(files) > 1:
        raise _refused(f"it holds {len(files)} GGUF files; leave the one that is to be loaded")
    try:
        with open_inside(folder, files[0]) as file:
            found = gguf_file.read(file)
            version = file.version
    except gguf_file.UnknownPacking as error:
        raise _refused(
            "its GGUF file is packed in a way that is not known here; take one that is packed otherwise"
        ) from error
    except (OSError, ValueError) as error:
        raise _refused("its GGUF file is damaged; copy it anew") from error
    if found.metadata.get("split.count", 1) not in (0, 1):
        raise _refused("its GGUF file is one of several; join them with llama-gguf-split --merge")
    if version.size < found.end:
        raise _refused("its GGUF file ends too early; copy it anew")
    names = gguf_config.names_of(found)
    config, versions = _config(folder) if (folder / "config.json").exists() else (gguf_config.config_of(found), ())
    config = {"dtype": gguf_config.dtype_of(found), **config}
    # Unpacked, all of them are floats.
    tensors = [StoredTensor(names[tensor.name], "F32", tensor.shape) for tensor in found.weights]
    return ModelFolder(config, tuple(files), tuple(tensors), found, ((files[0], version), *versions))


def open_inside(folder: Path, path: Path) -> SteadyFile:
    """Open a file of a folder's, which may be a link within the models' root: the hub's cache has such.

    Raises:
        Refused: `load_failed` for a link that leads out of it.
    """
    # A model is always two folders below the root.
    if not path.resolve().is_relative_to(folder.parent.parent.resolve()):
        raise _refused(f"its {shown(path.name)} is a link that leads out of the models' folder; put the file itself there")
    return SteadyFile(path)


def _config(folder: Path) -> tuple[Mapping[str, Any], tuple[tuple[Path, Version], ...]]:
    try:
        with open_inside(folder, folder / "config.json") as file:
            config = json.loads(file.read(min(file.version.size, LARGEST_CONFIG), 0))
    except (OSError, ValueError) as error:
        raise _refused("its config.json cannot be read; copy it anew") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _refused("its config.json names no model_type; take the one that came with the weights")
    if config.get("quantization_config"):
        raise _refused(
            "its weights are quantised already; take the model's own, which can be quantised while they are loaded"
        )
    return config, ((file.path, file.version),)


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
        with open_inside(folder, index) as file:
            return set(json.loads(file.read(min(file.version.size, LARGEST_HEADER), 0))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused("the index of its weights cannot be read; copy it anew") from error


def _tensors(file: SteadyFile, number: int) -> list[StoredTensor]:
    damaged = _refused("one of the weights' files is damaged; copy it anew")
    try:
        (size,) = HEADER_SIZE.unpack(file.read(HEADER_SIZE.size, 0))
        start = HEADER_SIZE.size + size
        header = json.loads(file.read(min(size, LARGEST_HEADER, file.version.size), HEADER_SIZE.size))
        header.pop("__metadata__", None)
        spans = {name: tuple(map(int, tensor["data_offsets"])) for name, tensor in header.items()}
        tensors = [
            StoredTensor(name, tensor["dtype"], tuple(tensor["shape"]), number, start + spans[name][0])
            for name, tensor in header.items()
        ]
        whole = all(end - begin == tensor.nbytes for tensor, (begin, end) in zip(tensors, spans.values(), strict=True))
    except Exception as error:  # whatever a damaged header makes of it
        raise damaged from error
    # One after the other, as the format has them: what a file holds takes no more memory than the file does.
    order = sorted(span for span in spans.values() if span[0] != span[1])
    ends = [0, *(end for _, end in order)]
    if file.version.size < start + max((end for _, end in spans.values()), default=0):
        raise _refused("one of the weights' files ends too early; copy it anew")
    if not whole or any(begin != end for (begin, _), end in zip(order, ends, strict=False)):
        raise damaged
    return tensors


def _refused(why: str) -> Refused:
    return Refused("load_failed", f"the model's folder cannot be loaded: {why}")
