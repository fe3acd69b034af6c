"""How a model will be loaded, settled before it is: nothing is left open, and what it takes is told beforehand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from LLM import placement
from LLM._base_model_handler import LoadOptions
from LLM.errors import Refused
from LLM.loader import load
from LLM.placement import CPU_KV_MEMORY, memory_of, plan
from LLM.room import SHARE

CPU = LoadOptions(device="cpu")


def silent(stage: str, progress: float) -> None:
    """Nobody wants to know."""


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_nothing_is_left_open(default_model_folder: Path, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settled = plan(default_model_folder, LoadOptions()).options
    assert settled == LoadOptions("bfloat16" if has_bfloat16 else "float32", "cpu", decode="eager")
    assert plan(default_model_folder, settled).options == settled


@pytest.mark.parametrize(("dtype", "decode"), [("float32", "eager"), ("bfloat16", "eager"), ("bfloat16", "compiled")])
def test_what_a_load_takes_is_told_within_a_tenth(default_model_folder: Path, dtype: str, decode: str):
    threads = torch.get_num_threads()
    options = replace(CPU, dtype=dtype, decode=decode, kv_memory=64 << 20)
    loaded = load(default_model_folder, options, silent)
    torch.set_num_threads(threads)
    assert loaded.runner.notes == []
    assert plan(default_model_folder, options).memory_bytes == pytest.approx(loaded.runner.memory_bytes, rel=0.1)


def test_the_kv_cache_counts(default_model_folder: Path):
    default, small = (plan(default_model_folder, replace(CPU, kv_memory=size)).memory_bytes for size in (None, 0))
    assert default - small == CPU_KV_MEMORY


GPU_BYTES = 200 << 20  # less than the default model takes as float32 with its KV cache


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend to have so many GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=GPU_BYTES))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (100 << 20, GPU_BYTES))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, 0))

    return pretend


@pytest.mark.parametrize(
    ("count", "asked", "offload", "device", "room"),
    [
        (1, "auto", False, "cuda:0", GPU_BYTES),
        (4, "auto", False, "cuda", 4 * GPU_BYTES),
        (4, "cuda", False, "cuda", 4 * GPU_BYTES),
        (4, "cuda:2", False, "cuda:2", GPU_BYTES),
        (1, "auto", True, "cuda", GPU_BYTES + (1 << 30)),
        (4, "auto", True, "cuda", 4 * GPU_BYTES + (1 << 30)),
        (4, "cpu", True, "cpu", 1 << 30),
    ],
)
def test_a_model_too_large_for_a_gpu_is_spread_over_all_and_the_cpu_only_if_that_is_allowed(
    default_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpus: Callable[[int], None],
    count: int,
    asked: str,
    offload: bool,
    device: str,
    room: int,
):
    gpus(count)
    (tmp_path / "limit").write_text(str(1 << 30))
    monkeypatch.setattr(placement, "CGROUP_LIMITS", [str(tmp_path / "limit")])
    options = LoadOptions("float32", asked, offload=offload, kv_memory=64 << 20)
    found = plan(default_model_folder, options)
    assert (found.options.device, found.device_bytes) == (device, room)
    assert found.options.decode == ("graph" if ":" in device else "eager")
    assert plan(default_model_folder, found.options) == found


@pytest.mark.parametrize(
    ("device", "quantization", "asked", "decode"),
    [
        ("cuda:0", "none", "auto", "graph"),
        ("cuda:0", "int8", "auto", "eager"),
        ("cuda:0", "none", "eager", "eager"),
        ("cuda:0", "nf4", "graph", "graph"),
        ("cpu", "none", "auto", "eager"),
        ("cpu", "none", "compiled", "compiled"),
    ],
)
def test_a_gpu_decodes_by_graphs_where_that_fits_unless_told_otherwise(
    default_model_folder: Path, gpus: Callable[[int], None], device: str, quantization: str, asked: str, decode: str
):
    gpus(1)
    options = LoadOptions("float32", device, quantization, kv_memory=64 << 20, decode=asked)
    assert plan(default_model_folder, options).options.decode == decode


def test_a_model_that_fits_a_gpu_stays_there(
    default_model_folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: Callable[[int], None]
):
    gpus(4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=80 << 30))
    assert plan(default_model_folder, LoadOptions(offload=True)).options.device == "cuda:0"


def test_a_gpu_without_bfloat16_is_not_asked_for_it(
    default_model_folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: Callable[[int], None]
):
    gpus(1)
    assert plan(default_model_folder, LoadOptions()).options.dtype == "bfloat16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (7, 5))
    assert plan(default_model_folder, LoadOptions()).options.dtype == "float32"
    assert plan(default_model_folder, LoadOptions("float16")).options.dtype == "float16"
    with pytest.raises(Refused, match="take float32") as refused:
        plan(default_model_folder, LoadOptions("bfloat16"))
    assert (refused.value.reason, refused.value.field) == ("unsupported", "dtype")


def test_each_gpus_share_leaves_room_for_its_part_of_the_kv_cache(gpus: Callable[[int], None]):
    gpus(4)
    options = LoadOptions("float32", "cuda", kv_memory=64 << 20)
    each = int((100 << 20) * SHARE) - (16 << 20)
    assert placement.shares(options) == {0: each, 1: each, 2: each, 3: each}
    assert placement.shares(replace(options, offload=True))["cpu"] == int(memory_of(torch.device("cpu")) * SHARE)


def test_a_device_that_is_not_there_is_refused(default_model_folder: Path):
    with pytest.raises(Refused) as refused:
        plan(default_model_folder, LoadOptions(device="cuda:99"))
    assert (refused.value.reason, refused.value.field) == ("unsupported", "device")


def test_a_container_has_the_memory_that_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement, "CGROUP_LIMITS", ())
    whole = memory_of(torch.device("cpu"))
    assert whole > 1 << 28
    limits = [tmp_path / name for name in ("no limit", "absent", "limit")]
    limits[0].write_text("max\n")
    limits[2].write_text(f"{1 << 27}\n")
    monkeypatch.setattr(placement, "CGROUP_LIMITS", [str(path) for path in limits[:2]])
    assert memory_of(torch.device("cpu")) == whole
    monkeypatch.setattr(placement, "CGROUP_LIMITS", [str(path) for path in limits])
    assert memory_of(torch.device("cpu")) == 1 << 27
