"""Decode attention over the paged KV cache as a Triton kernel: one query per sequence, its context split over programs.

With one query there are too few rows and heads to fill a GPU, so each program attends to one split of one sequence's
context, and a second kernel joins the splits: https://crfm.stanford.edu/2023/10/12/flashdecoding.html. How many splits there
are depends on shapes alone, and lengths and block tables are read on the device, so that a CUDA graph can hold it. Knows no
model, no scheduling and no prefill. Only to be imported where triton is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from LLM.engine.early import launch_options

LOG2_E = 1.4426950408889634  # powers of two are what the hardware has
TILE_BYTES = 8192  # of keys, and as many of values, that a program loads at once: small, so that short contexts split too
LARGEST_TILE = 32  # tokens
SMALLEST_DOT = 16  # rows and columns of the smallest matrix product that Triton knows
MOST_SPLITS = 32
WAVES = 4  # programs per processor that keep its memory requests coming
NO_WINDOW = 2**30


def paged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attend one query per sequence to that sequence's keys and values; give [rows, heads, dimension].

    Takes query [rows, heads, dimension], the newest token's; keys and values [blocks, block size, kv heads, dimension] of
    one layer, the newest token's among them; block_table [rows, most blocks of a sequence] and lengths [rows], both int32.
    A length is at least 1; entries of the table beyond a sequence's end are not read. Heads that share a kv head lie beside
    each other. A query sees the last `window` tokens. Scores are scaled by `scaling`, by default dimension ** -0.5, then
    capped by `softcap`. `splits` is a power of two.
    """
    rows, heads, dim = query.shape
    _, block_size, kv_heads, _ = keys.shape
    assert (keys.shape, keys.stride()) == (values.shape, values.stride()), "keys and values lie alike"
    assert query.stride(-1) == keys.stride(-1) == lengths.stride(0) == 1
    width = max(SMALLEST_DOT, triton.next_power_of_2(dim))
    tile = tile_for(width * keys.element_size())
    if splits is None:
        tiles = triton.cdiv(block_table.shape[1] * block_size, tile)
        splits = splits_for(rows * kv_heads, tiles, _processors(query.device))
    output, options = query.new_empty(rows, heads, dim), launch_options(query.device)
    partial = query.new_empty(rows, heads, splits, dim, dtype=torch.float32) if splits > 1 else output
    tops, totals = query.new_empty(2, rows, heads, splits, dtype=torch.float32)
    _attend_split[rows, kv_heads, splits](
        query, keys, values, block_table, lengths, partial, tops, totals,
        *query.stride()[:2], *keys.stride()[:3], *block_table.stride(), window or NO_WINDOW,
        *_scales(dim**-0.5 if scaling is None else scaling, softcap),
        CAPPED=softcap is not None, DIM=dim, WIDTH=width, GROUP=heads // kv_heads, BLOCK=block_size, TILE=tile,
        SPLITS=splits, PADDED=max(SMALLEST_DOT, triton.next_power_of_2(heads // kv_heads)), **options,
    )  # fmt: skip
    if splits > 1:
        _join_splits[rows * heads,](partial, tops, totals, output, DIM=dim, WIDTH=width, SPLITS=splits, **options)
    return output


def tile_for(token_bytes: int) -> int:
    """Give how many tokens a program loads at once, each of `token_bytes` bytes of keys: a power of two."""
    return min(LARGEST_TILE, max(SMALLEST_DOT, TILE_BYTES // token_bytes))


def splits_for(programs: int, tiles: int, processors: int) -> int:
    """Give the power of two by which to split each of `programs` contexts of up to `tiles` tiles to busy `processors`."""
    most: int = triton.next_power_of_2(min(MOST_SPLITS, tiles))
    # Rounded down: programs that have to wait for others to end cost more than the few that are missing.
    wanted = max(1, WAVES * processors // programs)
    return min(most, 1 << (wanted.bit_length() - 1))


def _processors(device: torch.device) -> int:
    # Triton's interpreter runs on the CPU, one program after the other.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _scales(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Give what the kernel multiplies products of query and key by, and what the capped ones, for powers of two."""
    if softcap is None:
        return scaling * LOG2_E, 0.0
    # The kernel's tanh(x) is 2 sigmoid(2 x) - 1.
    return 2 * scaling / softcap, softcap * LOG2_E


@triton.jit  # type: ignore[untyped-decorator]
def _attend_split(  # type: ignore[no-untyped-def]
    query, keys, values, block_table, lengths, partial, tops, totals,
    query_row, query_head, cache_block, cache_slot, cache_head, table_row, table_block, window,
    scale, cap,
    CAPPED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Attend one row's heads of one kv head to one split: the online softmax of https://arxiv.org/abs/2205.14135.

    Gives, per head and split, the weighted sum of values [DIM], the largest score and the sum of weights.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    begin = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - begin, TILE), SPLITS) * TILE
    first = begin + split * share
    last = tl.minimum(first + share, length)
    if EARLY:
        gdc_wait()  # for the query and the newest token; the lengths were there before
        gdc_launch_dependents()

    head, dim = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    heads = kv_head * GROUP + head
    real = (head < GROUP)[:, None] & (dim < DIM)[None, :]
    q = tl.load(query + row * query_row + heads[:, None] * query_head + dim[None, :], mask=real, other=0.0)
    top = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    output = tl.zeros([PADDED, WIDTH], tl.float32)
    for start in range(first, last, TILE):
        place = start + tl.arange(0, TILE)
        seen = place < last
        block = tl.load(block_table + row * table_row + place // BLOCK * table_block, mask=seen, other=0)
        slot = block.to(tl.int64) * cache_block + (place % BLOCK) * cache_slot + kv_head * cache_head
        loaded = seen[:, None] & (dim < DIM)[None, :]
        k = tl.load(keys + slot[:, None] + dim[None, :], mask=loaded, other=0.0)
        v = tl.load(values + slot[:, None] + dim[None, :], mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(scores) - 1)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        output = output * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher

    # A split that a short context leaves empty stores weights of 0 under a score of minus infinity.
    place = (row * tl.num_programs(1) * GROUP + heads) * SPLITS + split
    if SPLITS == 1:  # and this is the output itself
        whole = (output / total[:, None]).to(partial.dtype.element_ty)
        tl.store(partial + place[:, None] * DIM + dim[None, :], whole, mask=real)
        return
    tl.store(tops + place, top, mask=head < GROUP)
    tl.store(totals + place, total, mask=head < GROUP)
    tl.store(partial + place[:, None] * DIM + dim[None, :], output, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _join_splits(  # type: ignore[no-untyped-def]
    partial, tops, totals, output, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr
) -> None:  # fmt: skip
    """Join the splits of one row's one head, each weighed by how its largest score stands to the largest of all."""
    place, dim = tl.program_id(0), tl.arange(0, WIDTH)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    split = place * SPLITS + tl.arange(0, SPLITS)
    top = tl.load(tops + split)
    weights = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(totals + split) * weights, 0)
    parts = tl.load(partial + split[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
    joined = tl.sum(parts * weights[:, None], 0) / total
    tl.store(output + place * DIM + dim, joined.to(output.dtype.element_ty), mask=dim < DIM)
