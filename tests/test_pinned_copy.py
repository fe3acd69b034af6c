"""Tensors on their way through pieces of memory, here from the CPU to itself: they arrive whole, whatever their size."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from LLM import pinned_copy
from LLM.pinned_copy import PinnedCopy

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_copy, "PIECE", 64)


def brought(copy: PinnedCopy, tensor: torch.Tensor) -> torch.Tensor:
    source = tensor.reshape(-1).view(torch.uint8)

    def fill(part: torch.Tensor, start: int) -> None:
        part.copy_(source[start : start + len(part)])

    return copy(tensor.nbytes, fill).view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (15, 2), (32,), (33,), (7, 11, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_a_tensor_arrives_as_it_was(shape: tuple[int, ...], dtype: torch.dtype):
    copy = PinnedCopy(CPU)
    for _ in range(3):
        tensor = torch.randn(shape).mul(100).to(dtype)
        assert torch.equal(brought(copy, tensor), tensor)


def test_several_threads_do_not_get_in_each_others_way():
    copy = PinnedCopy(CPU)
    tensors = [torch.full((50 + n,), n) for n in range(40)]
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(lambda tensor: brought(copy, tensor), tensors), tensors))
