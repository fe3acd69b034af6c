"""Attention over the paged KV cache, called by transformers' own models through its `AttentionInterface`.

One forward pass carries many sequences packed in one row, without padding: a `Step` says which tokens belong together and
where their keys and values lie. The step travels through the model as a keyword argument of that name. The seam:
https://huggingface.co/docs/transformers/attention_interface.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
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
        return sum(self.nbytes_by_device.values())

    @property
    def nbytes_by_device(self) -> dict[torch.device, int]:
        """How much memory it takes on each device that layers are on."""
        found: dict[torch.device, int] = {}
        for tensor in (tensor for layer in self._layers.values() for tensor in layer):
            found[tensor.device] = found.get(tensor.device, 0) + tensor.nbytes
        return found

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
class Group:
    """Sequences of similar lengths that go forward by one token each, and attend in one operation.

    Shapes: places [rows], where in the packed row they are, None if they are all of it; tokens [rows * length], where in the
    cache each one's keys and values lie, or a slice if that is one piece; mask [rows, 1, 1, length], true for its own, None
    if all are as long.
    """

    rows: int
    places: Tensor | None
    tokens: Tensor | slice
    mask: Tensor | None

    def gather(self, cached: Tensor) -> Tensor:
        """Give the group's part of a layer's keys or values, [rows, kv heads, length, dimension]."""
        cached = cached.flatten(0, 1)
        found = cached[self.tokens] if isinstance(self.tokens, slice) else cached.index_select(0, self.tokens)
        return found.view(self.rows, -1, *cached.shape[1:]).transpose(1, 2)


class Step:
    """A step of any number of tokens per sequence, one sequence after the other."""

    def __init__(self, cache: PagedCache, slots: Tensor, rows: Sequence[Row]) -> None:
        self.cache = cache
        self.slots = slots
        self._rows = rows
        self._chunks = [row for row in rows if row.last - row.first > 1]
        self._streams = [row for row in rows if row.last - row.first == 1]
        # Every layer asks for the same ones; they grow with the lengths, so none outlives the step.
        self._masks: dict[tuple[int, int, int, int | None], Tensor] = {}
        self._groups: dict[int | None, list[Group]] = {}
        self._elsewhere: dict[torch.device, Step] = {}

    def to(self, device: Any, non_blocking: bool = False) -> "Step":
        """Give the step for layers on another device; accelerate calls this where a model is spread over several."""
        device = torch.device(device)
        if device == self.slots.device:
            return self
        if device not in self._elsewhere:
            rows = [replace(row, blocks=row.blocks.to(device, non_blocking=non_blocking)) for row in self._rows]
            self._elsewhere[device] = Step(self.cache, self.slots.to(device, non_blocking=non_blocking), rows)
        return self._elsewhere[device]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend query [heads, tokens, dimension] to a layer's keys and values; give [tokens, heads, dimension]."""
        if window not in self._groups:
            self._groups[window] = self._grouped(window)
        groups = self._groups[window]
        if not self._chunks and len(groups) == 1:
            return _attend_streams(groups[0], query, keys, values, scaling, softcap)
        output = query.new_empty(query.shape[1], query.shape[0], values.shape[-1])
        for group in groups:
            output[group.places] = _attend_streams(group, query, keys, values, scaling, softcap)
        for row in self._chunks:
            output[row.first : row.last] = self._attend_chunk(row, query, keys, values, scaling, window, softcap)
        return output

    def _attend_chunk(
        self,
        row: Row,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        heads, groups, n = query.shape[0], keys.shape[-2], row.last - row.first
        key = keys.index_select(0, row.blocks).flatten(0, 1)[: row.length].transpose(0, 1)
        value = values.index_select(0, row.blocks).flatten(0, 1)[: row.length].transpose(0, 1)
        mask = self._causal_mask(n, heads // groups, row.length, window)
        # The heads that share a key become rows of one product: no key is copied, and none is read twice.
        rows = query[:, row.first : row.last].reshape(groups, heads // groups * n, -1)
        return _softmax(rows[None], key[None], value[None], mask, scaling, softcap).reshape(heads, n, -1).transpose(0, 1)

    def _causal_mask(self, n: int, copies: int, length: int, window: int | None) -> Tensor:
        """Give [copies * n, length], true where a query may look; the queries are the newest n tokens, several times."""
        known = (n, copies, length, window)
        if known not in self._masks:
            other = torch.arange(length, dtype=torch.long, device=self.slots.device)[None]
            position = other[0, length - n :].repeat(copies)[:, None]
            mask = other <= position
            self._masks[known] = mask if window is None else mask & (other > position - window)
        return self._masks[known]

    def _grouped(self, window: int | None) -> list[Group]:
        """Put the streams in groups, none of which is twice as long as a sequence of it."""
        found: list[tuple[int, list[Row]]] = []
        for row in sorted(self._streams, key=lambda row: -row.length):
            length = row.length if window is None else min(row.length, window)
            if not found or 2 * length < found[-1][0]:
                found.append((length, []))
            found[-1][1].append(row)
        alone = len(found) == 1 and not self._chunks
        # A group that is alone answers in the order of its rows.
        return [self._group(length, self._streams if alone else rows, alone, window) for length, rows in found]

    def _group(self, length: int, rows: Sequence[Row], alone: bool, window: int | None) -> Group:
        device, size = self.slots.device, self.cache.block_size
        lengths = torch.tensor([row.length for row in rows], dtype=torch.long, device=device)[:, None]
        visible = lengths if window is None else lengths.clamp(max=window)
        offsets = torch.arange(length, dtype=torch.long, device=device)[None]
        # A shorter sequence repeats its last token, unseen: what is in another's blocks, or in none, may be no number.
        positions = torch.minimum(lengths - visible + offsets, lengths - 1)
        blocks = pad_sequence([row.blocks for row in rows], batch_first=True)
        tokens = (blocks.gather(1, positions // size) * size + positions % size).flatten()
        uneven = any(min(row.length, length) < length for row in rows)
        mask = (offsets < visible)[:, None, None] if uneven else None
        places = None if alone else torch.tensor([row.first for row in rows], dtype=torch.long, device=device)
        # Where a stream that runs alone has its blocks side by side, as it often does, nothing has to be copied.
        if alone and len(rows) == 1 and device.type == "cpu" and bool((tokens.diff() == 1).all()):
            return Group(1, places, slice(int(tokens[0]), int(tokens[-1]) + 1), mask)
        return Group(len(rows), places, tokens, mask)


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
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        output: Tensor = torch.ops.wsserver.attend(query, key, value, layer, scaling, sliding_window, softcap)
        return output, None
    if step is None:
        raise DoesNotFit("it does not hand a step on to its attention")
    if attention_mask is not None or any(isinstance(o, Tensor) for name, o in others.items() if name not in KNOWN):
        raise DoesNotFit("its attention takes more than queries, keys and values")
    return _attend(step, query, key, value, layer, scaling, sliding_window, softcap), None


@contextmanager
def attending(step: PagedStep) -> Iterator[None]:
    """Let compiled graphs that this thread runs meanwhile attend to a step: it cannot travel through them."""
    token = _attended.set(step)
    try:
        yield
    finally:
        _attended.reset(token)


def _attend(
    step: PagedStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = step.cache.layer(layer, key, value, window)
    keys.flatten(0, 1).index_copy_(0, step.slots, key)
    values.flatten(0, 1).index_copy_(0, step.slots, value)
    return step.attend(query[0], keys, values, scaling, window, softcap)[None]


def _attend_compiled(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return _attend(_attended.get(), query, key, value, *others)


def _like_attended(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attend_streams(
    group: Group, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attend the group's queries of [heads, tokens, dimension] to their own sequences; give [rows, heads, dimension]."""
    heads, groups = query.shape[0], keys.shape[-2]
    query = query.transpose(0, 1)
    if group.places is not None:
        query = query.index_select(0, group.places)
    key, value = group.gather(keys), group.gather(values)
    # As in a chunk: the heads that share a key are rows of one product.
    rows = query.reshape(group.rows, groups, heads // groups, -1)
    return _softmax(rows, key, value, group.mask, scaling, softcap).reshape(group.rows, heads, -1)


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(NAME, paged_attention)
# cuDNN's attention is planned anew for every size, 30 ms each time, and here hardly two sizes are alike.
torch.backends.cuda.enable_cudnn_sdp(False)

# The same as an operation that a compiled graph may hold. Torch need not know of the cache that it writes to: no other
# operation looks there.
_attended: ContextVar[PagedStep] = ContextVar("attended")
_LIBRARY: Any = torch.library.Library("wsserver", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, int layer, float? scaling, int? window, float? softcap) -> Tensor")
_LIBRARY.impl("attend", _attend_compiled, "CPU")
_LIBRARY.impl("attend", _like_attended, "Meta")
