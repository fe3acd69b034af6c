"""The decode kernel against attention in float64 by Triton's interpreter, and compiled for GPUs that are not here.

Triton decides when it is imported whether it interprets, so the interpreted kernel runs in a process of its own. What only a
GPU can show is in tests/gpu.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.interpreter import interpreting

triton = pytest.importorskip("triton", reason="the kernel needs Triton, which there is for Linux alone")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from LLM.engine import paged_decode as kernels  # noqa: E402

BLOCK_SIZE = 16
FAR = 2**20  # a block that no cache has: to read it is an invalid memory access


@dataclass(frozen=True)
class Case:
    """Shapes and parameters of one call; everything else is drawn from the seed."""

    heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (1, 16, 17, 63, 190)
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    splits: int | None = 4
    seed: int = 0


def tables(lengths: tuple[int, ...], blocks: int) -> Tensor:
    """Deal the blocks out in a random order; beyond a sequence's end the table holds what nobody may read."""
    order = torch.randperm(blocks).tolist()
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    rows = [[order.pop() for _ in range(count)] + [FAR] * (max(counts) - count) for count in counts]
    return torch.tensor(rows, dtype=torch.int32)


def reference(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """Attend [heads, dimension] to [kv heads, length, dimension] as the textbook says."""
    key, value = (t.repeat_interleave(case.heads // case.kv_heads, 0)[:, -(case.window or 10**6) :] for t in (key, value))
    if case.softcap is None:
        return scaled_dot_product_attention(query[:, None], key, value, scale=case.scaling)[:, 0]
    scores = query[:, None] @ key.mT * (case.scaling or case.dim**-0.5)
    return ((scores / case.softcap).tanh() * case.softcap).softmax(-1).matmul(value)[:, 0]


def compare(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Give what the kernel on a device and what the reference makes of a case, both in float64."""
    torch.manual_seed(case.seed)
    blocks = sum(-(-length // BLOCK_SIZE) for length in case.lengths) + 3
    cache = torch.full((2, blocks, BLOCK_SIZE, case.kv_heads, case.dim), torch.nan, dtype=case.dtype)
    block_table = tables(case.lengths, blocks)
    # As a model has it: [1, heads, rows, dimension], turned.
    query = torch.randn(case.heads, len(case.lengths), case.dim).to(case.dtype).transpose(0, 1)
    expected = []
    for row, length in enumerate(case.lengths):
        places = torch.arange(length)
        at = block_table[row, places // BLOCK_SIZE].long(), places % BLOCK_SIZE
        fresh = torch.randn(2, length, case.kv_heads, case.dim).to(case.dtype)
        cache[0][at], cache[1][at] = fresh
        key, value = fresh.double().transpose(1, 2)
        expected.append(reference(query[row].double(), key, value, case))
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    settings = (case.scaling, case.window, case.softcap, case.splits)
    tensors = [tensor.to(device) for tensor in (query, *cache, block_table, lengths)]
    return kernels.paged_decode(*tensors, *settings).double().cpu(), torch.stack(expected)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[Case], tuple[Tensor, Tensor]]]:
    """Runs `compare` where Triton interprets."""
    with interpreting() as call:
        yield lambda case: call(compare, case)


CASES = {
    **{f"dimension {dim}": Case(dim=dim) for dim in (8, 64, 80, 96, 128, 256)},
    **{f"{heads} heads of {kv}": Case(heads=heads, kv_heads=kv) for heads, kv in ((1, 1), (4, 4), (9, 3), (8, 1), (40, 2))},
    **{f"{splits} splits": Case(splits=splits) for splits in (1, 2, 8, 32, None)},
    **{f"window {window}": Case(window=window) for window in (1, 5, 16, 100, 4096)},
    "soft cap": Case(softcap=2.5),
    "scaling": Case(scaling=0.3),
    "soft cap, scaling and window": Case(softcap=4.0, scaling=0.5, window=40, dim=256),
    "float16": Case(dtype=torch.float16, dim=128),
    "float16, all of it": Case(dtype=torch.float16, dim=80, window=50, softcap=3.0, scaling=0.2),
}


# bfloat16 is proven in tests/gpu: the interpreter multiplies its bits as whole numbers.
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_attends_every_row_to_its_own_sequence_alone(name: str, interpreted: Callable):
    case = CASES[name]
    found, expected = interpreted(case)
    tolerance = 1e-5 if case.dtype == torch.float32 else 3e-3
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_any_lengths_and_tables_do(seed: int, interpreted: Callable):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 400, (7,), generator=generator).tolist()
    found, expected = interpreted(Case(lengths=tuple(lengths), splits=None, seed=seed))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_padded_rows_of_length_one_disturb_nobody(interpreted: Callable):
    case = Case(lengths=(40, 200))
    padded = replace(case, lengths=(*case.lengths, 1, 1, 1))
    found, expected = interpreted(padded)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("programs", "tiles", "splits"),
    [(8, 256, 32), (8, 5, 8), (8, 1, 1), (64, 256, 8), (100, 256, 4), (512, 256, 1), (4096, 256, 1)],
)
def test_few_programs_are_split_until_the_gpu_is_busy(programs: int, tiles: int, splits: int):
    assert kernels.splits_for(programs, tiles, processors=132) == splits


POINTERS = {
    "block_table": "*i32",
    "lengths": "*i32",
    "partial": "*fp32",
    "tops": "*fp32",
    "totals": "*fp32",
    "slots": "*i64",
    "parts": "*fp32",
}
CACHED = ("query", "keys", "values", "output", "row", "rows", "norm", "weight", "heads", "cos", "sin", "queries", "sums")
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on the smallest GPUs of these kinds


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], capability: int) -> Any:
    """Compile a kernel for an NVIDIA GPU of a compute capability, with pointers and strides aligned as torch has them."""
    types = {name: POINTERS.get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(CACHED, f"*{dtype}") | dict.fromkeys(("scale", "cap", "eps"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n] not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize(
    ("capability", "dim", "dtype", "capped"),
    [
        (80, 256, "fp32", True),
        (90, 64, "fp32", False),
        (80, 80, "fp16", False),
        (90, 256, "bf16", True),
        (90, 128, "bf16", False),
    ],
)
def test_the_kernels_compile_for_a_gpu(
    capability: int, dim: int, dtype: str, capped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    width, size = triton.next_power_of_2(dim), int(dtype[-2:]) // 8
    shape = {"DIM": dim, "WIDTH": width, "SPLITS": 8, "EARLY": capability >= 90}
    rest = {"CAPPED": capped, "GROUP": 4, "BLOCK": BLOCK_SIZE, "TILE": kernels.tile_for(width * size), "PADDED": 16}
    attend = compiled(kernels._attend_split, dtype, shape | rest, capability)
    assert attend.metadata.shared <= SHARED_MEMORY
    # The tiles of keys and values are fetched ahead of their use, and 16-bit ones multiplied by the matrix units.
    assert "cp.async" in attend.asm["ptx"]
    assert ("mma.sync" in attend.asm["ptx"]) == (size == 2)
    assert compiled(kernels._join_splits, dtype, shape, capability).asm["cubin"]
