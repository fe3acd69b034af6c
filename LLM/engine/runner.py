"""The forward pass of a step: all its slices packed in one row, over a paged KV cache. Knows no scheduling.

A runner is what the engine thread calls. This one serves every model whose attention goes through transformers' attention
interface; `plain_runner.py` has the one for the others, and the echo model one of its own, without tensors.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from LLM.engine.attention import NAME, DoesNotFit, PagedCache, Row, Step
from LLM.engine.request import GenerationRequest, Sampled
from LLM.engine.rounding import relative_error, tolerance
from LLM.engine.sampler import Drawn, sample
from LLM.engine.sequence import Sequence, Slice

BLOCK_SIZE = 16
# What a chunk of prompt may hold: on a CPU a step of this many is what a cancel may have to wait for, on a GPU the first
# size at which the weights' way through memory no longer counts.
MAX_PREFILL = {"cpu": 256, "cuda": 2048}
# Where the parts of a text end by which a model is probed: two chunks of prompt, and a token alone as in decoding.
PROBE = (23, 39, 40)


class PagedRunner:
    """Runs all slices of a step in one forward pass."""

    reuses_blocks = True

    def __init__(self, model: Any, cache: PagedCache) -> None:
        self._model = model
        self._cache = cache
        self.block_count = cache.blocks
        self.block_size = cache.block_size
        self.max_prefill = MAX_PREFILL.get(model.device.type, 256)
        self.notes: list[str] = []

    @property
    def memory_bytes(self) -> int:
        """What the weights and the KV cache take."""
        return self._weight_bytes + self.kv_bytes

    @cached_property
    def _weight_bytes(self) -> int:
        # Walking the modules takes 20 ms: too long for every status and every refused load.
        return weight_bytes(self._model)

    @property
    def kv_bytes(self) -> int:
        """What the KV cache takes; it is made by the first forward pass."""
        return self._cache.nbytes

    @torch.inference_mode()
    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        """Advance each slice's sequence; give what was sampled after it, None where its prefill is not finished.

        Raises:
            MemoryError: the device had not enough memory.
        """
        try:
            tokens = iter(self.draw(batch).read())
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise MemoryError(str(error)) from error
        return [next(tokens) if part.samples else None for part in batch]

    def free(self, key: Hashable) -> None:
        """Nothing is kept by key: the blocks are the scheduler's."""

    def warm_up(self) -> None:
        """Run one token through the model, so that the first request does not pay for what is done once."""
        sequence = Sequence(GenerationRequest("warm-up", (0,), 1), blocks=[0])
        self.forward([Slice(sequence, 0, 1)], [0])

    @torch.inference_mode()
    def draw(self, batch: list[Slice]) -> Drawn:
        """Run a step, and draw a token after each slice that ends its sequence."""
        ends = [end for part, end in zip(batch, ends_of(batch), strict=True) if part.samples]
        logits = self.forward(batch, ends)
        return sample(logits[: len(ends)], [part.sequence for part in batch if part.samples])

    @torch.inference_mode()
    def forward(self, batch: list[Slice], ends: list[int]) -> Tensor:
        """Give the logits [len(ends), vocabulary] at places `ends` of the packed row."""
        device = self._model.device
        positions = [position for part in batch for position in range(part.start, part.stop)]
        output = self._model(
            input_ids=self.input_ids(batch)[None],
            position_ids=torch.tensor([positions], dtype=torch.long, device=device),
            use_cache=False,
            # Nothing is asked for when no prompt ends in this step, but 0 would mean everything.
            logits_to_keep=torch.tensor(ends or [0], dtype=torch.long, device=device),
            step=self._describe(batch),
        )
        logits: Tensor = output.logits[0]
        return logits

    def input_ids(self, batch: list[Slice]) -> Tensor:
        """Give the ids of the packed row, [tokens]."""
        ids = [token_id for part in batch for token_id in part.sequence.token_ids[part.start : part.stop]]
        return torch.tensor(ids, dtype=torch.long, device=self._model.device)

    def _describe(self, batch: list[Slice]) -> Step:
        size, device = self.block_size, self._model.device
        slots, rows, first = [], [], 0
        for part in batch:
            blocks = part.sequence.blocks
            slots += [blocks[position // size] * size + position % size for position in range(part.start, part.stop)]
            last = first + part.stop - part.start
            used = torch.tensor(blocks[: -(-part.stop // size)], dtype=torch.long, device=device)
            rows.append(Row(first, last, part.stop, used))
            first = last
        return Step(self._cache, torch.tensor(slots, dtype=torch.long, device=device), tuple(rows))


def ends_of(batch: list[Slice]) -> list[int]:
    """Give the place of each slice's last token in the packed row."""
    ends, place = [], -1
    for part in batch:
        place += part.stop - part.start
        ends.append(place)
    return ends


def ran_out_of_memory(error: Exception) -> bool:
    """Say whether that is what an exception of torch's means; the allocator of a CPU has no type of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def weight_bytes(model: Any) -> int:
    """Give the memory of a model's weights, with the scales of those that are quantised; tied ones count once."""
    tensors = [*model.parameters(), *model.buffers(), *_scales(model)]
    # Tied ones share their storage, merged ones too. What oneDNN has packed tells no storage, and is nobody else's.
    # What lies in the CPU's memory until a GPU needs it has none here either.
    lone = [t for t in tensors if t.is_mkldnn or t.is_meta]
    shared = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not (t.is_mkldnn or t.is_meta)
    }
    return sum([*shared.values(), *(t.nbytes for t in lone)])


def _scales(model: Any) -> Iterator[Tensor]:
    # Where bitsandbytes keeps them: its layers of 4 bits in the weight's state, those of 8 in their own.
    for module in model.modules():
        for state in (getattr(getattr(module, "weight", None), "quant_state", None), getattr(module, "state", None)):
            for scale in (getattr(state, "absmax", None), getattr(state, "SCB", None)):
                if isinstance(scale, Tensor):
                    yield scale


class Probe:
    """A short text by which a model is compared with itself: whole, by the model's own means, and in parts."""

    @torch.inference_mode()
    def __init__(self, model: Any) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        self._ids = tuple((7919 * i + 11) % vocabulary for i in range(PROBE[-1]))
        ids = torch.tensor([self._ids], dtype=torch.long, device=model.device)
        self._expected = model(input_ids=ids, use_cache=False).logits[0, -1]
        self._tolerance = tolerance(model)

    @torch.inference_mode()
    def compare(self, forward: Callable[[Slice], Tensor], blocks: list[int]) -> None:
        """Let the parts go forward, in these blocks; `forward` gives the logits [vocabulary] after a slice.

        Raises:
            DoesNotFit: the logits in the end differ by more than rounding.
        """
        sequence = Sequence(GenerationRequest("probe", self._ids, 1), blocks=blocks)
        for start, stop in zip((0, *PROBE), PROBE, strict=False):
            found = forward(Slice(sequence, start, stop))
        error = relative_error(found, self._expected)
        if not error < self._tolerance:
            raise DoesNotFit(f"a text in parts gives logits that differ from those of the whole by {error:.1e}")


def page(model: Any) -> dict[torch.device, int]:
    """Make a model attend over a paged cache, and give the bytes that one of its tokens takes there, on each device.

    Raises:
        DoesNotFit: the model does not do there what it does with its own attention, which it has again.
    """
    own = model.config._attn_implementation
    cache = PagedCache(10, BLOCK_SIZE)
    try:
        probe = Probe(model)
        model.set_attn_implementation(NAME)
        runner = PagedRunner(model, cache)
        probe.compare(lambda part: runner.forward([part], [part.stop - part.start - 1])[0], blocks=[5, 3, 9])
        _check_windows(model.config.get_text_config(), cache)
    except Exception as error:
        # Whatever went wrong in another's code, the model's own way is still there.
        model.set_attn_implementation(own)
        if ran_out_of_memory(error):
            raise
        raise DoesNotFit(in_words(error)) from error
    return {device: size // (cache.blocks * cache.block_size) for device, size in cache.nbytes_by_device.items()}


def in_words(error: Exception) -> str:
    """Say why a model does not fit; what another's exception says is for the log, not for clients."""
    return str(error) if isinstance(error, DoesNotFit) else f"it raises {type(error).__name__}"


def _check_windows(config: Any, cache: PagedCache) -> None:
    # The probe is too short to show how far back a layer sees.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if strange := set(kinds) - {"sliding_attention", "full_attention"}:
        raise DoesNotFit(f"it has layers of {', '.join(sorted(strange))}")
    windows = {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds)}
    if cache.windows != windows:
        raise DoesNotFit(f"its layers see {cache.windows} tokens back, where its configuration says {windows}")
