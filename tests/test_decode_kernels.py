"""The kernels of a decode step's layers against float64, by Triton's interpreter, and compiled for absent GPUs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from LLM.engine.fused_modules import HeadNorm, RMSNorm
from tests.interpreter import interpreting
from tests.test_paged_decode import SHARED_MEMORY, compiled

pytest.importorskip("triton", reason="the kernels need Triton, which there is for Linux alone")

from LLM.engine import decode_kernels as kernels

DTYPES = [torch.float32, torch.float16]  # bfloat16 is proven in tests/gpu: the interpreter does not know it
# Of the results, whose numbers are about 1, and of what 16-bit types round on the way.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = [(6, 64), (7, 1024), (10, 1088), (5, 2100)]  # outputs and inputs: odd ones, one piece, a piece and a bit
EPS = 1e-3


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function where Triton interprets."""
    with interpreting() as call:
        yield call


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Give numbers of the type, held in the type."""
    return (torch.randn(*shape) * scale).to(dtype)


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()


def products(
    rows: int, outputs: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Give what the kernels and what float64 make of all three kinds of product."""
    torch.manual_seed(rows + outputs)
    x, norm = normal(rows, size, dtype=dtype, scale=0.1), RMSNorm(normal(size, dtype=dtype), EPS)
    weight, sums = normal(2 * outputs, size, dtype=dtype, scale=size**-0.5), normal(rows, 2 * outputs, dtype=dtype)
    exact, exact_norm = x.double(), normed(x.double(), norm)
    both = exact_norm @ weight.double().t()
    expected = [both, silu(both[:, :outputs]) * both[:, outputs:], sums.double() + exact @ weight.double().t()]
    x, weight, sums, norm = x.to(device), weight.to(device), sums.to(device), norm.to(device)
    normed_product = kernels.normed_linear(x, norm, weight).double().sum(0)
    made = [normed_product, kernels.gated_linear(x, norm, weight), kernels.add_linear(sums, x, weight)]
    return [each.double().cpu() for each in made], expected


def turned(
    rows: int, counts: tuple[int, int], dim: int, dtype: torch.dtype, with_norm: bool, parts: int, device: str = "cpu"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Give the queries and the cache that the kernel and that float64 leave behind."""
    torch.manual_seed(rows + dim)
    queries, kv = counts
    heads = normal(parts, rows, queries + 2 * kv, dim, dtype=dtype if parts == 1 else torch.float32)
    angles = torch.rand(rows, dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norm = HeadNorm(normal(queries + kv, dim, dtype=dtype), EPS) if with_norm else None
    slots = torch.randperm(5 * 16)[:rows]
    cache = normal(2, 5, 16, kv, dim, dtype=dtype)
    exact = heads.double().sum(0)
    turning = exact[:, : queries + kv]
    if norm:
        turning = turning * (turning.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.weight.double()
    low, high = turning.chunk(2, -1)
    turning = turning * cos.double()[:, None] + torch.cat((-high, low), -1) * sin.double()[:, None]
    expected = cache.double()
    expected[0].view(-1, kv, dim)[slots] = turning[:, queries:]
    expected[1].view(-1, kv, dim)[slots] = exact[:, queries + kv :]
    keys, values = cache.to(device)
    made = kernels.rotate(
        *(heads.to(device), counts, cos.to(device), sin.to(device), norm.to(device) if norm else None),
        *(slots.to(device), keys, values),
    )
    found = (made, keys, values)
    return tuple(each.double().cpu() for each in found), (turning[:, :queries], expected[0], expected[1])


def assert_close(found: Any, expected: Any, dtype: torch.dtype) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("outputs", "size"), SIZES)
def test_products_take_norm_gate_and_sum_along(
    outputs: int, size: int, rows: int, dtype: torch.dtype, interpreted: Callable
):
    assert_close(*interpreted(products, rows, outputs, size, dtype), dtype)


# Queries and keys, the dimension, and in how many parts they come.
TURNS = [((4, 4), 16, 1), ((6, 2), 64, 2), ((3, 1), 80, 1), ((8, 1), 128, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("counts", "dim", "parts"), TURNS)
def test_heads_are_turned_and_land_in_their_slots(
    counts: tuple[int, int], dim: int, parts: int, with_norm: bool, dtype: torch.dtype, interpreted: Callable
):
    assert_close(*interpreted(turned, 5, counts, dim, dtype, with_norm, parts), dtype)


@pytest.mark.parametrize("early", [False, True])
def test_the_kernels_compile_for_a_gpu(early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capability, rest = (90 if early else 80), {"EARLY": early}
    product = {"SIZE": 3072, "WIDTH": 1024, "ROWS": 2, "NORMED": True, "GATED": True, "ADDED": False}
    ptx = compiled(kernels._multiply_row, "bf16", product | rest, capability).asm["ptx"]
    assert "ld.global.v4" in ptx
    assert ("griddepcontrol" in ptx) == early
    compiled(kernels._rms_norm, "bf16", {"SIZE": 3072, "WIDTH": 4096} | rest, capability)
    compiled(kernels._gate, "bf16", {"PARTS": 2, "SIZE": 8192, "WIDTH": 1024} | rest, capability)
    compiled(kernels._add, "bf16", {"PARTS": 4, "WIDTH": 1024} | rest, capability)
    few = {"SIZE": 3072, "SHARE": 1536, "WIDE": 16, "TALL": 64, "DEEP": 128, "STAGES": 4}
    made = compiled(kernels._multiply_rows, "bf16", few | rest, capability)
    assert made.metadata.shared <= SHARED_MEMORY
    assert "cp.async" in made.asm["ptx"]
    heads = {"PARTS": 2, "QUERIES": 24, "KEYS": 8, "DIM": 128, "WIDTH": 128, "NORMED": True}
    compiled(kernels._rotate, "bf16", heads | rest, capability)
