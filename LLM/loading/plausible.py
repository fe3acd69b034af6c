"""Whether a config.json fits the tensors that are there: what it says is built before any of them is read.

Knows no architecture, so it bounds; how many numbers a model has exactly is checked once its architecture is known.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from LLM.errors import Refused
from LLM.loading.steady_file import shown

MOST_LAYERS = 1024  # several times those of any published model
LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers", "num_blocks"}
SIZES = {"vocab_size", "hidden_size", "n_embd", "d_model"}
NUMBERED = re.compile(r"(.*?)(?:^|\.)(\d+)\.")  # `model.layers.` and the number of a layer


class Tensor(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...


def check(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> None:
    """Check the sizes that a configuration states.

    Raises:
        Refused: `load_failed`, naming the first that the tensors contradict.
    """
    layers, largest = _found(tensors)
    for name, value in _numbers(config):
        most = min(layers, MOST_LAYERS) if name in LAYERS else largest
        if not 0 <= value <= most:
            why = f"its config.json has a {name} of {shown(str(value), 20)}, and its weights allow {most} at most"
            message = f"the model's folder cannot be loaded: {why}; copy config.json and the weights anew"
            raise Refused("load_failed", message)


def _found(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Return the number of layers and the largest size that tensors have."""
    numbers: dict[str, set[str]] = defaultdict(set)
    largest = 0
    for tensor in tensors:
        largest = max(largest, *tensor.shape, 0)
        if found := NUMBERED.match(tensor.name):
            numbers[found[1]].add(found[2])
    return max(map(len, numbers.values()), default=0), largest


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Return the checked sizes of a configuration, and of the part of it that is the language model's."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for name in sorted(LAYERS | SIZES):
            value = part.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield name, value
