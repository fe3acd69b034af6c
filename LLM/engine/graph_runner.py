"""A paged runner whose steps of few tokens are CUDA graphs, launched one ahead. Only to be imported where triton is."""

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from LLM.engine.ahead import AheadRunner
from LLM.engine.attention import PagedCache
from LLM.engine.decode_layers import fuse_layers
from LLM.engine.graph_decode import LARGEST, GraphDecoder
from LLM.engine.runner import BLOCK_SIZE, ends_of
from LLM.engine.sampler import Drawn, is_greedy
from LLM.engine.sequence import Slice


class GraphRunner(AheadRunner):
    """Runs a step of few tokens as a graph; of one that carries a long prompt too what decodes, and then the rest."""

    _decoder: GraphDecoder | None = None

    def __init__(self, model: Any, blocks: int, capacity: int, context_length: int) -> None:
        # The last block is nobody's: the rows that fill up a graph write there.
        super().__init__(model, PagedCache(blocks + 1, BLOCK_SIZE))
        self.block_count = blocks
        self.max_prefill = LARGEST
        self._rows = {}
        fuse_layers(model, self.warm_up)
        most = min(blocks, -(-context_length // BLOCK_SIZE))
        decoder = GraphDecoder(model, self._cache, trash_block=blocks, capacity=capacity, blocks=most)
        decoder.check(self.forward)
        if decoder.note:
            self.notes.append(decoder.note)
        self._decoder = decoder

    @torch.inference_mode()
    def draw(self, batch: list[Slice]) -> Drawn:
        """Run a step, and draw a token after each slice that ends its sequence."""
        if not self._decoder:
            return super().draw(batch)
        if self._decoder.takes(batch) and all(part.samples and is_greedy(part.sequence) for part in batch):
            self._decoder.forward(batch, self._rows)
            return Drawn.of(self._decoder.tokens[: len(batch)].clone())
        drawn = super().draw(batch)
        # Where the next step looks for them.
        self._decoder.tokens[: len(drawn.tokens)] = drawn.tokens
        return drawn

    @torch.inference_mode()
    def forward(self, batch: list[Slice], ends: list[int]) -> Tensor:
        """Give the logits [len(ends), vocabulary] at places `ends` of the packed row."""
        if not self._decoder:
            return super().forward(batch, ends)
        few = batch if self._decoder.takes(batch) else list(takewhile(lambda part: part.stop - part.start == 1, batch))
        if not self._decoder.takes(few):
            return super().forward(batch, ends)
        logits = self._decoder.forward(few, self._rows)
        if not all(part.samples for part in few):
            logits = logits[[row for row, part in enumerate(few) if part.samples]]
        rest = batch[len(few) :]
        if not rest:
            return logits
        # Beside them, not with them: to read the weights twice costs less than to attend row by row.
        ends = [end for part, end in zip(rest, ends_of(rest), strict=True) if part.samples]
        return torch.cat([logits, super().forward(rest, ends)])[: len(logits) + len(ends)]
