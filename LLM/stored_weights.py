"""The tensors of a folder's safetensors files, each read when it is asked for; progress is by the bytes that were read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open

from LLM._base_model_handler import Progress
from LLM.model_folder import ModelFolder

# Brings a tensor to where its model is to be.
Bring = Callable[[torch.Tensor], torch.Tensor]


class StoredWeight:
    """A tensor that is still in its file; to index it is to read it, as with the slices that transformers takes."""

    def __init__(self, name: str, file: Any, bring: "Bring", reading: "Reading") -> None:
        self._name = name
        self._file = file
        self._bring = bring
        self._reading = reading

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._bring(self._file.get_tensor(self._name)[index])
        self._reading.has_read(self._name)
        return tensor


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
    """Give the folder's tensors by name, while its files are open."""
    reading = Reading({tensor.name: tensor.nbytes for tensor in folder.tensors}, quantised, progress)
    with ExitStack() as open_files:
        files = [open_files.enter_context(safe_open(file, framework="pt")) for file in folder.files]
        yield {name: StoredWeight(name, file, bring, reading) for file in files for name in file.keys()}  # noqa: SIM118
        reading.end()
