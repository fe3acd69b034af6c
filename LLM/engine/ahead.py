"""Steps launched one ahead: the next one is on its way to the device before the last one's tokens are read back.

So a GPU that decodes greedily does not wait for the host; a step that draws from a part of the vocabulary still waits in the
sampler. Knows no scheduling: who may run ahead of its own last token is the worker's to say.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from LLM.engine.request import Sampled
from LLM.engine.runner import PagedRunner, ends_of, ran_out_of_memory
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice


class AheadRunner(PagedRunner):
    """A paged runner whose steps can be launched before the tokens of the last one are known."""

    # The rows of the last step's tokens, still on the device, by sequence.
    _rows: dict[Sequence, int]
    _tokens: Tensor

    def launch(self, batch: list[Slice]) -> Callable[[], list[Sampled | None]]:
        """Start a step; the call it gives waits for the results.

        Raises:
            MemoryError: the device had not enough memory.
        """
        try:
            drawn = self.draw(batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise MemoryError(str(error)) from error
        # What is true of the batch now; when the results are read its sequences have gone on.
        samples = [part.samples for part in batch]
        self._tokens = drawn.tokens
        self._rows = {part.sequence: row for row, part in enumerate(part for part in batch if part.samples)}
        host = drawn.to_host()
        copied = _mark(drawn.tokens.device)

        def read() -> list[Sampled | None]:
            if copied:
                copied.synchronize()
            tokens = iter(host.read())
            return [next(tokens) if sampled else None for sampled in samples]

        return read

    def input_ids(self, batch: list[Slice]) -> Tensor:
        """Give the ids of the packed row, [tokens], those in flight taken from the last step on the device."""
        ids = super().input_ids(batch)
        if flown := self.in_flight(batch):
            places, tokens = flown
            ids[places] = tokens
        return ids

    def in_flight(self, batch: list[Slice]) -> tuple[Tensor, Tensor] | None:
        """Give the places in the packed row whose tokens are in flight, and those tokens; None if none are."""
        places = [
            (end, self._rows[part.sequence])
            for end, part in zip(ends_of(batch), batch, strict=True)
            if part.samples and part.sequence.token_ids[-1] == IN_FLIGHT
        ]
        if not places:
            return None
        device = self._tokens.device
        # From pinned memory: any other copy would wait for the step in flight.
        pinned = torch.tensor(places, dtype=torch.long, pin_memory=device.type == "cuda")
        ends, rows = pinned.to(device, non_blocking=True).unbind(-1)
        # A row that failed has no token; its next one is for nothing, but must not be looked up out of bounds.
        return ends, self._tokens[rows].clamp(min=0)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Mark what was launched so far, to be waited for without spinning; a CPU has done it already."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
