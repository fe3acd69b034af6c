"""The tensors of a folder's safetensors files, each read when it is asked for; progress is by the bytes that were read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

from LLM._base_model_handler import Progress
from LLM.loading.steady_file import SteadyFile, check_unchanged
from LLM.model_folder import ModelFolder, StoredTensor

# torch's types by safetensors' names.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}

# Fills a tensor of bytes with those of a stored one, from a place on.
Fill = Callable[[torch.Tensor, int], None]
# Makes a tensor where its model is to be, given how many bytes it has and what fills them.
Bring = Callable[[int, Fill], torch.Tensor]


class StoredWeight:
    """A tensor that is still in its file; to index it is to read it, as with the slices that transformers takes."""

    def __init__(self, tensor: StoredTensor, file: SteadyFile, bring: Bring, reading: "Reading") -> None:
        self._tensor = tensor
        self._file = file
        self._bring = bring
        self._reading = reading

    def __getitem__(self, index: Any) -> torch.Tensor:
        stored = self._bring(self._tensor.nbytes, self._fill)
        tensor = stored.view(DTYPES[self._tensor.element]).view(self._tensor.shape)[index]
        self._reading.has_read(self._tensor.name)
        return tensor

    def _fill(self, part: torch.Tensor, start: int) -> None:
        self._file.read_into(part.numpy().data, self._tensor.offset + start)


def in_memory(size: int, fill: Fill) -> torch.Tensor:
    """Read a tensor's bytes into the CPU's memory."""
    stored = torch.empty(size, dtype=torch.uint8, device="cpu")
    fill(stored, 0)
    return stored


class Reading:
    """How far the reading is: in a stage of its own from the first weight on that is quantised as soon as it is read.

    Several threads may read.
    """

    def __init__(self, sizes: Mapping[str, int], quantised: Collection[str], progress: Progress) -> None:
        self._sizes = dict(sizes)  # of those not read yet
        self._quantised = frozenset(quantised)
        self._progress = progress
        self._lock = Lock()
        self._stage, self._done = "weights", 0
        self._goal = sum(size for name, size in sizes.items() if name not in self._quantised)

    def has_read(self, name: str) -> None:
        """Tell that a tensor was read."""
        with self._lock:
            if self._stage == "weights" and name in self._quantised:
                self._stage, self._done, self._goal = "quantise", 0, sum(self._sizes.values())
            self._done += self._sizes.pop(name, 0)
            self._progress(self._stage, self._done / self._goal)

    def end(self) -> None:
        """Tell that nothing more will be read: a folder may hold what its model has no use for."""
        self._progress(self._stage, 1.0)


@contextmanager
def stored_weights(
    folder: ModelFolder, quantised: Collection[str], bring: Bring, progress: Progress
) -> Iterator[dict[str, StoredWeight]]:
    """Give the folder's tensors by name, while its files are open.

    Raises:
        Refused: `load_failed` for a file that is no longer what the folder was told to hold, also at the end.
    """
    reading = Reading({tensor.name: tensor.nbytes for tensor in folder.tensors}, quantised, progress)
    with ExitStack() as open_files:
        known = folder.versions[: len(folder.files)]
        files = [open_files.enter_context(SteadyFile(path, version)) for path, version in known]
        yield {tensor.name: StoredWeight(tensor, files[tensor.file], bring, reading) for tensor in folder.tensors}
        check_unchanged(folder.versions)
        reading.end()
