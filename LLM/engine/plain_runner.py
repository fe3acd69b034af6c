"""The forward pass for models whose attention cannot be paged: one slice after the other, each with transformers' own cache.

Slower, without reuse between requests, and without a bound on the caches' memory; for what `runner.py` cannot serve.
"""

import logging
from collections.abc import Hashable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from LLM.engine.attention import DoesNotFit
from LLM.engine.request import Sampled
from LLM.engine.runner import MAX_PREFILL, Probe, in_words, ran_out_of_memory, weight_bytes
from LLM.engine.sampler import sample
from LLM.engine.sequence import Slice

log = logging.getLogger(__name__)


class PlainRunner:
    """Runs slices one after the other through a causal language model of transformers."""

    reuses_blocks = False
    kv_bytes = 0
    # Its caches grow as they need to. One block holds any sequence, so that none is ever preempted.
    block_count = 1 << 12
    block_size = 1 << 24

    def __init__(self, model: Any, note: str) -> None:
        self._model = model
        self._caches: dict[Hashable, DynamicCache] = {}
        self.max_prefill = MAX_PREFILL.get(model.device.type, 256)
        self.notes = [note]

    @cached_property
    def memory_bytes(self) -> int:
        """What the weights take."""
        return weight_bytes(self._model)

    @torch.inference_mode()
    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        """Advance each slice's sequence; give what was sampled after it, None where its prefill is not finished."""
        return [self._advance(part) for part in batch]

    def free(self, key: Hashable) -> None:
        """Drop a sequence's KV cache; unknown keys are those whose prefill never began."""
        self._caches.pop(key, None)

    def check(self) -> None:
        """See whether a text in parts is to the model what the whole is.

        Raises:
            DoesNotFit: it needs something of earlier parts that its cache does not keep.
        """
        try:
            Probe(self._model).compare(self._forward, blocks=[])
        except Exception as error:
            raise DoesNotFit(in_words(error)) from error
        finally:
            self.free("probe")

    def _advance(self, part: Slice) -> Sampled | None:
        try:
            logits = self._forward(part)
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            # What its cache holds now nobody knows, and the others' caches hold this step already: it ends, they go on.
            log.exception("not enough memory for one of the caches; ending that request")
            return Sampled(None)
        return sample(logits[None], [part.sequence]).read()[0] if part.samples else None

    def _forward(self, part: Slice) -> Tensor:
        """Give the logits [vocabulary] after a slice."""
        sequence = part.sequence
        if part.start == 0:
            self._caches[sequence.request.key] = DynamicCache(config=self._model.config)
        cache = self._caches[sequence.request.key]
        part_ids = [sequence.token_ids[part.start : part.stop]]
        ids = torch.tensor(part_ids, dtype=torch.long, device=self._model.device)
        logits: Tensor = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]
