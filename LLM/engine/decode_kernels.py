"""What a layer does to the few rows of a decode step besides attending, as Triton kernels: fewer and faster than torch's.

Such a step is reading the weights, and all else should take no time: what lies between two products is one kernel, and the
product of a single row takes the norm before it and the sum or gate after it along. Knows no model and no step. Only to be
imported where triton is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from LLM.engine.early import launch_options
from LLM.engine.fused_modules import HeadNorm, RMSNorm
from LLM.engine.paged_decode import SMALLEST_DOT

WIDTH = 1024  # columns that a program multiplies at once
ROWS = 2  # of a weight, that a program multiplies a row by
FEW = 32  # rows up to which a product is reading the weight, and cuBLAS has no kernel that does it as fast
# The part of a weight that a program multiplies few rows by at once, and how many of them are on their way.
TALL, DEEP, STAGES = 64, 128, 4
PROGRAMS = 132  # that a product should have at least, to read as fast as a GPU can


def normed_linear(rows: Tensor, norm: RMSNorm, weight: Tensor) -> Tensor:
    """Give the product of the normed rows [rows, size] and a linear layer's weight [outputs, size].

    It comes in parts that are to be added up, [parts, rows, outputs].
    """
    if len(rows) == 1:
        return _matvec(rows, weight, norm=norm)[None]
    return _product(rms_norm(rows, norm), weight)


def gated_linear(rows: Tensor, norm: RMSNorm, weight: Tensor) -> Tensor:
    """Give silu(gate) * up [rows, outputs], of the normed rows' products with the weight [2 outputs, size] of both."""
    if len(rows) == 1:
        return _matvec(rows, weight, norm=norm, gated=True)
    return gate(_product(rms_norm(rows, norm), weight), rows.dtype)


def add_linear(sums: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Add the product of the rows [rows, size] and a weight [outputs, size] to `sums`, and give those."""
    if len(rows) == 1:
        return _matvec(rows, weight, sums=sums)
    if not _is_few(rows):
        return sums.addmm_(rows, weight.t())
    parts = _product(rows, weight)
    count = sums.numel()
    _add[triton.cdiv(count, WIDTH),](
        sums, parts, count, PARTS=len(parts), WIDTH=WIDTH, num_warps=4, **launch_options(sums.device)
    )
    return sums


def _is_few(rows: Tensor) -> bool:
    return len(rows) <= FEW and rows.dtype != torch.float32


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """Give the product of the rows [rows, size] and a weight [outputs, size] in parts, [parts, rows, outputs]."""
    if not _is_few(rows):
        return linear(rows, weight)[None]
    (count, size), outputs = rows.shape, len(weight)
    assert weight.is_contiguous()
    programs = triton.cdiv(outputs, TALL)
    parts = min(triton.next_power_of_2(triton.cdiv(PROGRAMS, programs)), max(1, size // (2 * DEEP)))
    output = rows.new_empty(parts, count, outputs, dtype=torch.float32)
    _multiply_rows[programs, parts](
        rows, weight, output, count, outputs, SIZE=size, SHARE=triton.cdiv(size, parts * DEEP) * DEEP,
        WIDE=max(SMALLEST_DOT, triton.next_power_of_2(count)), TALL=TALL, DEEP=DEEP, STAGES=STAGES, num_warps=4,
        **launch_options(rows.device),
    )  # fmt: skip
    return output


def rms_norm(rows: Tensor, norm: RMSNorm) -> Tensor:
    """Give the rows [rows, size] divided by their root mean square, and weighed."""
    output = torch.empty_like(rows)
    size = rows.shape[-1]
    width = triton.next_power_of_2(size)
    _rms_norm[len(rows),](
        rows, norm.weight, output, norm.eps, SIZE=size, WIDTH=width, num_warps=min(8, max(1, width // 512)),
        **launch_options(rows.device),
    )  # fmt: skip
    return output


def gate(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Give silu(first half) * second half of each of the rows [parts, rows, 2 size]."""
    parts, count, size = len(rows), rows.shape[1], rows.shape[-1] // 2
    output = rows.new_empty(count, size, dtype=dtype)
    _gate[count, triton.cdiv(size, WIDTH)](rows, output, PARTS=parts, SIZE=size, WIDTH=WIDTH, **launch_options(rows.device))
    return output


def rotate(
    heads: Tensor,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    norm: HeadNorm | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Turn queries and keys by their positions, and put keys and values in the cache; give the queries.

    Takes heads [parts, rows, queries + 2 keys, dimension], `counts` of queries and of keys, cos and sin [rows, dimension],
    slots [rows], and keys and values [blocks, block size, keys, dimension] of one layer. Gives [rows, queries, dimension].
    """
    (parts, rows, _, dim), (queries, kv) = heads.shape, counts
    assert keys.is_contiguous()
    assert values.is_contiguous()
    output = keys.new_empty(rows, queries, dim)
    _rotate[rows, queries + 2 * kv](
        heads, cos, sin, norm.weight if norm else heads, slots, output, keys, values, norm.eps if norm else 0.0,
        PARTS=parts, QUERIES=queries, KEYS=kv, DIM=dim, WIDTH=triton.next_power_of_2(dim), NORMED=norm is not None,
        num_warps=1, **launch_options(heads.device),
    )  # fmt: skip
    return output


def _matvec(
    row: Tensor, weight: Tensor, norm: RMSNorm | None = None, sums: Tensor | None = None, gated: bool = False
) -> Tensor:
    outputs, size = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    assert weight.is_contiguous()
    output = row.new_empty(1, outputs) if sums is None else sums
    _multiply_row[triton.cdiv(outputs, ROWS),](
        row, norm.weight if norm else row, weight, output, outputs, norm.eps if norm else 0.0,
        SIZE=size, WIDTH=min(WIDTH, triton.next_power_of_2(size)), ROWS=ROWS,
        NORMED=norm is not None, GATED=gated, ADDED=sums is not None, **launch_options(row.device),
    )  # fmt: skip
    return output


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_row(  # type: ignore[no-untyped-def]
    row, norm, weight, output, outputs, eps,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply one row [SIZE] by ROWS rows of a weight, once they are on their way; a norm is a factor of the product."""
    place, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    real = (place < outputs)[:, None]
    weights = weight + place.to(tl.int64)[:, None] * SIZE + column[None, :]
    other = weights + outputs.to(tl.int64) * SIZE  # where the second half of a gated weight begins
    w = tl.load(weights, mask=real & (column < SIZE)[None, :], other=0.0)
    if GATED:
        w2 = tl.load(other, mask=real & (column < SIZE)[None, :], other=0.0)
    if EARLY:
        gdc_wait()  # for the row; weights never change
        gdc_launch_dependents()
    product = tl.zeros([ROWS, WIDTH], tl.float32)
    product2 = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    for start in range(0, SIZE, WIDTH):
        x = tl.load(row + start + column, mask=start + column < SIZE, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
            x *= tl.load(norm + start + column, mask=start + column < SIZE, other=0.0).to(tl.float32)
        product += x[None, :] * w.to(tl.float32)
        left = real & (start + WIDTH + column < SIZE)[None, :]
        if GATED:
            product2 += x[None, :] * w2.to(tl.float32)
            w2 = tl.load(other + start + WIDTH, mask=left, other=0.0)
        w = tl.load(weights + start + WIDTH, mask=left, other=0.0)
    factor = tl.rsqrt(tl.sum(squares, 0) / SIZE + eps) if NORMED else 1.0
    result = tl.sum(product, 1) * factor
    if GATED:
        result = result * tl.sigmoid(result) * tl.sum(product2, 1) * factor
    if ADDED:
        result += tl.load(output + place, mask=place < outputs).to(tl.float32)
    tl.store(output + place, result.to(output.dtype.element_ty), mask=place < outputs)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_rows(  # type: ignore[no-untyped-def]
    rows, weight, output, count, outputs, SIZE: tl.constexpr, SHARE: tl.constexpr, WIDE: tl.constexpr,
    TALL: tl.constexpr, DEEP: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply all rows by TALL rows of a weight, in one part of the columns."""
    place, part = tl.program_id(0) * TALL + tl.arange(0, TALL), tl.program_id(1)
    row, column = tl.arange(0, WIDE), tl.arange(0, DEEP)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    product = tl.zeros([TALL, WIDE], tl.float32)
    for start in tl.range(part * SHARE, tl.minimum((part + 1) * SHARE, SIZE), DEEP, num_stages=STAGES):
        at = start + column
        w = tl.load(
            weight + place.to(tl.int64)[:, None] * SIZE + at[None, :],
            mask=(place < outputs)[:, None] & (at < SIZE)[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(rows + row[:, None] * SIZE + at[None, :], mask=(row < count)[:, None] & (at < SIZE)[None, :], other=0.0)
        product = tl.dot(w, tl.trans(x), product)
    target = output + (part * count + row)[None, :] * outputs + place[:, None]
    tl.store(target, product, mask=(row < count)[None, :] & (place < outputs)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _sum(parts, offset, distance, mask, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up what lies at the same place of each part, `distance` apart."""
    total = tl.load(parts + offset, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * distance + offset, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    sums, parts, count, PARTS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr
) -> None:  # fmt: skip
    """Add the parts of a product to some of the sums."""
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.load(sums + place, mask=place < count, other=0.0).to(tl.float32)
    total += _sum(parts, place, count, place < count, PARTS)
    tl.store(sums + place, total.to(sums.dtype.element_ty), mask=place < count)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]
    rows, norm, output, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr
) -> None:  # fmt: skip
    """Norm one row."""
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    weight = tl.load(norm + column, mask=column < SIZE, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(rows + row * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    result = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
    tl.store(output + row * SIZE + column, result.to(output.dtype.element_ty), mask=column < SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    rows, output, PARTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr
) -> None:  # fmt: skip
    """Gate some columns of one row."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, column = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    distance = tl.num_programs(0) * 2 * SIZE
    x = _sum(rows, row * 2 * SIZE + column, distance, column < SIZE, PARTS)
    up = _sum(rows, row * 2 * SIZE + SIZE + column, distance, column < SIZE, PARTS)
    tl.store(output + row * SIZE + column, (x * tl.sigmoid(x) * up).to(output.dtype.element_ty), mask=column < SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    heads, cos, sin, norm, slots, queries, keys, values, eps,
    PARTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    NORMED: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Turn one head of one row, or only move it where it is a value."""
    row, head, dim = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    real, half = dim < DIM, DIM // 2
    partner = tl.where(dim < half, dim + half, dim - half)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    own, distance = (row * (QUERIES + 2 * KEYS) + head) * DIM, tl.num_programs(0) * (QUERIES + 2 * KEYS) * DIM
    x = _sum(heads, own + dim, distance, real, PARTS)
    slot = tl.load(slots + row).to(tl.int64) * KEYS
    if head < QUERIES + KEYS:
        other = _sum(heads, own + partner, distance, real, PARTS)
        if NORMED:
            factor = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
            x *= factor * tl.load(norm + head * DIM + dim, mask=real, other=0.0).to(tl.float32)
            other *= factor * tl.load(norm + head * DIM + partner, mask=real, other=0.0).to(tl.float32)
        other = tl.where(dim < half, -other, other)
        x *= tl.load(cos + row * DIM + dim, mask=real, other=0.0).to(tl.float32)
        x += other * tl.load(sin + row * DIM + dim, mask=real, other=0.0).to(tl.float32)
    result = x.to(queries.dtype.element_ty)
    if head < QUERIES:
        tl.store(queries + (row * QUERIES + head) * DIM + dim, result, mask=real)
    elif head < QUERIES + KEYS:
        tl.store(keys + (slot + head - QUERIES) * DIM + dim, result, mask=real)
    else:
        tl.store(values + (slot + head - QUERIES - KEYS) * DIM + dim, result, mask=real)
