"""A paged runner that decodes a stream that runs alone by a graph of the whole model, made by `torch.compile`.

Between its products a CPU's decode step is hundreds of small operations; compiled, they are a few. The products and the
attention are operations of their own in the graph. A bfloat16 model's weights are held twice, the second time for products
with one row. A C++ compiler is needed, and the first load of a model waits for it; later ones find most of its work in
torch's cache on disk.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from LLM.engine.attention import PagedCache, attending
from LLM.engine.fused_modules import PackedLinear
from LLM.engine.request import GenerationRequest
from LLM.engine.rounding import relative_error, tolerance
from LLM.engine.runner import PagedRunner
from LLM.engine.sequence import Sequence, Slice

log = logging.getLogger(__name__)


class CompiledRunner(PagedRunner):
    """Runs a step of one token by the graph, and every other one as it is; a model that cannot be compiled gets a note."""

    _compiled: Any = None
    _one_row_bytes = 0

    def __init__(self, model: Any, cache: PagedCache) -> None:
        super().__init__(model, cache)
        sequence = Sequence(GenerationRequest("compile", (0, 1), 1), blocks=[0])
        token = [Slice(sequence, 1, 2)]
        self.forward([Slice(sequence, 0, 1)], [0])
        expected = self.forward(token, [0])
        packed = [part for part in model.modules() if isinstance(part, PackedLinear)]
        try:
            self._one_row_bytes = sum(part.pack_for_one_row() for part in packed)
            self._compiled = torch.compile(  # type: ignore[call-overload]  # its types lack an option
                self._decode,
                fullgraph=True,
                dynamic=False,
                # Every step's inputs are alike, and the graph is this runner's own: there is nothing to look up or to guard,
                # which takes 1 ms a step.
                isolate_recompiles=True,
                options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
            )
            error = relative_error(self.forward(token, [0]), expected)
            if not error <= tolerance(model):
                raise ValueError(f"the logits differ by {error:.1e}")
        except Exception as error:  # the compiler's own, of many kinds
            log.warning("decoding eagerly, because the model could not be compiled", exc_info=True)
            self.notes.append(f"decodes eagerly: compiling it raised {type(error).__name__}")
            self._compiled = None
            self._one_row_bytes = 0
            for part in packed:
                part.forget_one_row()

    @property
    def memory_bytes(self) -> int:
        """What the weights, in all their forms, and the KV cache take."""
        return super().memory_bytes + self._one_row_bytes

    @torch.inference_mode()
    def forward(self, batch: list[Slice], ends: list[int]) -> Tensor:
        """Give the logits [len(ends), vocabulary] at places `ends` of the packed row."""
        if self._compiled is None or len(batch) > 1 or batch[0].stop - batch[0].start > 1:
            return super().forward(batch, ends)
        with attending(self._describe(batch)):
            start = torch.tensor([[batch[0].start]], dtype=torch.long)
            logits: Tensor = self._compiled(self.input_ids(batch)[None], start)
        return logits[0]

    def _decode(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits
