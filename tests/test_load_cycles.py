"""Loading and unloading again and again leaves nothing behind."""

import os
import sys
from pathlib import Path

import pytest
import torch

from LLM._base_model_handler import GenerationOptions, LoadOptions
from LLM.engine.worker import EngineSettings
from LLM.model import Waiter
from LLM.model_service import Keeping, ModelService
from tests.conftest import DEFAULT_MODEL, eventually


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def cycle(service: ModelService) -> None:
    async with service.use(service.resolve(), Waiter()) as model:
        request = await model.request("g", "The capital of France is", GenerationOptions(max_tokens=4))
        async with model.engine.open(request) as stream:
            async for _ in stream:
                pass
    await eventually(lambda: service.status() == [] and not service._leaving)


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_fifty_loads_leave_no_memory_behind(default_model_folder: Path, dtype: str):
    if not sys.platform.startswith("linux"):
        pytest.skip("this system does not tell how much memory a process has")
    threads = torch.get_num_threads()
    options = LoadOptions(dtype, "cpu", kv_memory=64 << 20, threads=1)
    service = ModelService(DEFAULT_MODEL, options, EngineSettings(), keeping=Keeping(keep_alive=0.0))
    sizes = []
    for _ in range(50):
        await cycle(service)
        sizes.append(resident_bytes())
    await service.close()
    torch.set_num_threads(threads)
    assert max(sizes[2:]) <= 1.05 * sizes[1], [size >> 20 for size in sizes]
