"""Attention over the paged KV cache, called by transformers' own models through its `AttentionInterface`.

One forward pass carries many sequences packed in one row, without padding: a `Step` says which tokens belong together and
where their keys and values lie. The step travels through the model as a keyword argument of that name. The seam:
https://huggingface.co/docs/transformers/attention_interface.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "wsserver_paged"
# Tensors that models hand to every attention function and that say nothing new to this one.
KNOWN = {"position_ids", "cache_position"}


class DoesNotFit(Exception):
    """The model's attention cannot be paged; the message says why, in words fit for any client."""


class PagedCache:
    """The keys and values of `blocks` blocks of `block_size` tokens, per layer; tensors are made when a layer first writes.

    Shapes: keys and values [blocks, block_size, kv heads, head dimension]. What was never written is never read.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        # How many tokens back each layer looks, None for all; known once it has written.
        self.windows: dict[int, int | None] = {}
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """How much memory it takes, in all layers that have written."""
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)

    def layer(self, index: int, key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Give a layer's keys and values, made for tokens like `key` and `value`, [tokens, kv heads, head dimension]."""
        if index not in self._layers:
            self.windows[index] = window
            self._layers[index] = (self._empty(key), self._empty(value))
        return self._layers[index]

    def _empty(self, like: Tensor) -> Tensor:
        return torch.empty(self.blocks, self.block_size, *like.shape[1:], dtype=like.dtype, device=like.device)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: its tokens `first` to `last` of the packed row, and the blocks of all it has so far."""

    first: int
    last: int
    length: int  # tokens in the cache, this step's included
    blocks: Tensor


class PagedStep(Protocol):
    """What every layer must know of a forward pass: where its new keys and values go, and who attends to what."""

    @property
    def cache(self) -> PagedCache:
        """Where all keys and values are."""
        ...

    @property
    def slots(self) -> Tensor:
        """Where in the cache the new keys and values go: [tokens]."""
        ...

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend query [heads, tokens, dimension] to a layer's keys and values; give [tokens, heads, dimension]."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """A step of any number of tokens per sequence, one sequence after the other."""

    cache: PagedCache
    slots: Tensor
    rows: tuple[Row, ...]
    # Every layer asks for the same ones; they grow with the length, so none outlives the step.
    masks: dict[tuple[int, int, int, int | None], Tensor] = field(default_factory=dict)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend query [heads, tokens, dimension] to a layer's keys and values; give [tokens, heads, dimension]."""
        output = query.new_empty(query.shape[1], query.shape[0], values.shape[-1])
        for row in self.rows:
            k = keys.index_select(0, row.blocks).flatten(0, 1)[: row.length].transpose(0, 1)
            v = values.index_select(0, row.blocks).flatten(0, 1)[: row.length].transpose(0, 1)
            output[row.first : row.last] = _attend(self, query[:, row.first : row.last], k, v, scaling, window, softcap)
        return output

    def causal_mask(self, n: int, copies: int, length: int, window: int | None) -> Tensor:
        """Give [copies * n, length], true where a query may look; the queries are the newest n tokens, several times."""
        known = (n, copies, length, window)
        if known not in self.masks:
            position = torch.arange(length - n, length, device=self.slots.device).repeat(copies)[:, None]
            other = torch.arange(length, device=self.slots.device)[None]
            mask = other <= position
            self.masks[known] = mask if window is None else mask & (other > position - window)
        return self.masks[known]


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: PagedStep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend, for one layer, every row of the step to its own sequence.

    Takes query [1, heads, tokens, dimension], key and value [1, kv heads, tokens, dimension]; gives [1, tokens, heads,
    dimension] and no attention weights. Sequences are causal, and see at most `sliding_window` tokens back.

    Raises:
        DoesNotFit: the model's attention is another function than this one, however near its results may be.
    """
    if step is None:
        raise DoesNotFit("it does not hand a step on to its attention")
    if attention_mask is not None or any(isinstance(o, Tensor) for name, o in others.items() if name not in KNOWN):
        raise DoesNotFit("its attention takes more than queries, keys and values")
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = step.cache.layer(int(module.layer_idx), key, value, sliding_window)  # type: ignore[arg-type]
    keys.flatten(0, 1).index_copy_(0, step.slots, key)
    values.flatten(0, 1).index_copy_(0, step.slots, value)
    return step.attend(query[0], keys, values, scaling, sliding_window, softcap)[None], None


def _attend(
    step: Step, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Attend queries [heads, n, d] to keys and values [kv heads, length, d], the last n of which are the queries' own."""
    heads, n, width = query.shape
    groups, length = key.shape[0], key.shape[1]
    mask = None
    if n > 1:
        mask = step.causal_mask(n, heads // groups, length, window)
    elif window is not None:
        key, value = key[:, -window:], value[:, -window:]
    # The heads that share a key become rows of one product: no key is copied, and none is read twice.
    rows = query.reshape(groups, heads // groups * n, width)
    return _softmax(rows, key, value, mask, scaling, softcap).reshape(heads, n, -1).transpose(0, 1)


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query[None], key[None], value[None], mask, scale=scaling)[0]
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(NAME, paged_attention)
