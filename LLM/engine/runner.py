"""The forward pass over a transformers model: every running sequence has a KV cache of its own. Knows no scheduling.

A runner is what the engine thread calls; the echo model has another one, without tensors.
"""

from collections.abc import Hashable
from typing import Any

import torch
from transformers import DynamicCache

from LLM.engine.sampler import sample
from LLM.engine.scheduler import Slice


class TransformersRunner:
    """Runs slices one after the other through a causal language model of transformers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: dict[Hashable, DynamicCache] = {}
        tensors = [*model.parameters(), *model.buffers()]
        self.memory_bytes: int = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one token through the model, so that the first request does not pay for what torch does once."""
        ids = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
        self._model(input_ids=ids, use_cache=False)

    @torch.inference_mode()
    def step(self, batch: list[Slice]) -> list[int | None]:
        """Advance each slice's sequence; give the token sampled after it, None where its prefill is not finished."""
        return [self._advance(part) for part in batch]

    def free(self, key: Hashable) -> None:
        """Drop a sequence's KV cache; unknown keys are those whose prefill never began."""
        self._caches.pop(key, None)

    def _advance(self, part: Slice) -> int | None:
        sequence = part.sequence
        cache = self._caches.get(sequence.request.key)
        if cache is None:
            cache = self._caches[sequence.request.key] = DynamicCache(config=self._model.config)
        ids = torch.tensor([sequence.token_ids[part.start : part.stop]], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return sample(output.logits[0, -1], sequence) if part.samples else None
