"""A paged runner whose decode steps are CUDA graphs, launched one ahead. Only to be imported where triton is."""

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from LLM.engine.ahead import AheadRunner
from LLM.engine.attention import PagedCache
from LLM.engine.graph_decode import GraphDecoder
from LLM.engine.runner import BLOCK_SIZE, ends_of
from LLM.engine.sequence import Slice


class GraphRunner(AheadRunner):
    """Runs the slices that decode as a graph, and prompts after them by themselves."""

    _decoder: GraphDecoder | None = None

    def __init__(self, model: Any, blocks: int, capacity: int, context_length: int) -> None:
        # The last block is nobody's: the rows that fill up a graph write there.
        super().__init__(model, PagedCache(blocks + 1, BLOCK_SIZE))
        self.block_count = blocks
        self.warm_up()
        most = min(blocks, -(-context_length // BLOCK_SIZE))
        decoder = GraphDecoder(model, self._cache, trash_block=blocks, capacity=capacity, blocks=most)
        decoder.check(self.forward)
        if decoder.note:
            self.notes.append(decoder.note)
        self._decoder = decoder

    @torch.inference_mode()
    def forward(self, batch: list[Slice], ends: list[int]) -> Tensor:
        """Give the logits [len(ends), vocabulary] at places `ends` of the packed row."""
        decoding = list(takewhile(lambda part: part.stop - part.start == 1, batch))
        if not self._decoder or not self._decoder.takes(decoding):
            return super().forward(batch, ends)
        logits = self._decoder.forward(decoding, self.in_flight(decoding))
        if not all(part.samples for part in decoding):
            logits = logits[[row for row, part in enumerate(decoding) if part.samples]]
        prompts = batch[len(decoding) :]
        if not prompts:
            return logits
        # Beside them, not with them: to read the weights twice costs less than to attend row by row.
        ends = [end for part, end in zip(prompts, ends_of(prompts), strict=True) if part.samples]
        return torch.cat([logits, super().forward(prompts, ends)])[: len(logits) + len(ends)]
