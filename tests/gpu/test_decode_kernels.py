"""The kernels of a decode step's layers on a GPU: every case that is interpreted on a CPU, bfloat16, and a model's sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which there is for Linux alone")

from tests.test_decode_kernels import SIZES, TOLERANCE, TURNS, assert_close, products, turned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 21, 64])
@pytest.mark.parametrize(("outputs", "size"), [*SIZES, (2560, 3072), (3072, 8192), (1001, 576)])
def test_products_take_norm_gate_and_sum_along(outputs: int, size: int, rows: int, dtype: torch.dtype):
    assert_close(*products(rows, outputs, size, dtype, "cuda"), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("counts", "dim", "parts"), [*TURNS, ((24, 8), 128, 2), ((4, 1), 256, 1)])
def test_heads_are_turned_and_land_in_their_slots(
    counts: tuple[int, int], dim: int, parts: int, with_norm: bool, dtype: torch.dtype
):
    assert_close(*turned(64, counts, dim, dtype, with_norm, parts, "cuda"), dtype)
