"""What the worker asks of a runner: a step, made at once or launched ahead. Knows neither tensors nor threads."""

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol, runtime_checkable

from LLM.engine.request import Sampled
from LLM.engine.sequence import Slice


class Runner(Protocol):
    """What runs a model: one call a step, and a word when a sequence is gone."""

    # The KV cache, in blocks of so many tokens; and whether what a block held can be used again by another sequence.
    block_count: int
    block_size: int
    reuses_blocks: bool
    # The most prompt tokens that one step should carry.
    max_prefill: int
    # What an operator should know of how this model runs.
    notes: list[str]

    @property
    def memory_bytes(self) -> int:
        """What the weights and the KV cache take."""
        ...

    @property
    def kv_bytes(self) -> int:
        """What the KV cache takes; 0 if there is none, or none of a fixed size."""
        ...

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        """Advance each slice's sequence; give what was sampled after it, None where its prefill is not finished.

        Raises:
            MemoryError: there was not enough memory; with less in a batch the step can be tried again.
        """
        ...

    def free(self, key: Hashable) -> None:
        """Drop what is kept of a sequence; the key may be unknown."""
        ...


@runtime_checkable
class RunsAhead(Protocol):
    """A runner that can be given a step before the tokens of the last one are known, so that its device never waits."""

    def launch(self, batch: list[Slice]) -> Callable[[], list[Sampled | None]]:
        """Do as `step` does, but give a call that waits for the results.

        A slice may end in `IN_FLIGHT`: the token that the step launched before sampled for its sequence.
        """
        ...


class Flight(NamedTuple):
    """A step whose results are still to be read: what it carries, counted at its launch, and when that was."""

    batch: list[Slice]
    decoding: int
    prefilled: int
    began: float
    read: Callable[[], list[Sampled | None]]
