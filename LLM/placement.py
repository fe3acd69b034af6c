"""Where and how a model will be loaded: the device, the precision, and the memory that takes. Loads nothing."""

import os
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from LLM import model_folder
from LLM._base_model_handler import LoadOptions, Plan
from LLM.catalogue.folder_cache import FolderCache
from LLM.engine.packing import packs
from LLM.errors import Refused
from LLM.giving_way import giving_way
from LLM.room import SHARE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU, ALL_GPUS = torch.device("cpu"), torch.device("cuda")
CPU_KV_MEMORY = 1 << 30  # bytes, where the operator did not say
FOLDERS = FolderCache()
# What a container may have, in cgroups' version 2 and 1.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def plan(folder: Path, options: LoadOptions) -> Plan:
    """Say how the model in `folder` will be loaded, and what that takes.

    A model that is too large for one GPU is spread over all of them, if no certain one was asked for; its device is "cuda".

    Raises:
        Refused: `unsupported` for options this machine cannot serve, `load_failed` for a folder that cannot be loaded.
    """
    if options.quantization != "none" and not find_spec("bitsandbytes"):
        why = f'this server lacks what {options.quantization} takes; its operator can "pip install bitsandbytes"'
        raise Refused("unsupported", why, "quantization")
    with giving_way():
        found = FOLDERS.read(folder)
    device = device_of(options.device)
    if options.dtype == "bfloat16" and not _has_bfloat16(device):
        raise Refused("unsupported", f"{device} has no bfloat16; take float32, or float16 where the model bears it", "dtype")
    settled = replace(options, dtype=options.dtype if options.dtype != "auto" else _dtype(found.dtype, device))
    need, available = _weights(found, settled, device) + _kv_memory(options), memory_of(device)
    if device.type == "cuda" and options.device in ("auto", "cuda") and need > available * SHARE:
        everywhere = memory_of(ALL_GPUS) + (memory_of(CPU) if options.offload else 0)
        if everywhere > available:
            device, available = ALL_GPUS, everywhere
    return Plan(replace(settled, device=str(device), decode=_decode(settled, device)), need, available)


def shares(options: LoadOptions) -> dict[int | str, int]:
    """Give the bytes that a model may take of each GPU that it is spread over, and of the CPU's memory ("cpu")."""
    gpus = range(torch.cuda.device_count())
    kv_memory = _kv_memory(options) // len(gpus)
    found: dict[int | str, int] = {gpu: int(torch.cuda.mem_get_info(gpu)[0] * SHARE) - kv_memory for gpu in gpus}
    return {**found, "cpu": int(memory_of(CPU) * SHARE)} if options.offload else found


def device_of(name: str) -> torch.device:
    """Give the device of a name, which may be "auto".

    Raises:
        Refused: `unsupported`, if this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise Refused("unsupported", f'this server has {count} CUDA devices, not {device}; take "auto"', "device")
    return device


def memory_of(device: torch.device) -> int:
    """Give the bytes that a GPU has, or all of them, or of the machine's memory those that this process may use."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count()) if device.index is None else [device.index]
        return sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not in a container, or without a limit
            limits.append(int(Path(path).read_text()))
    return min(limits)


def cores() -> int:
    """Give how many cores this process may use, where that is known: a container often has a few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _weights(found: model_folder.ModelFolder, options: LoadOptions, device: torch.device) -> int:
    weights = found.memory(options.dtype, options.quantization)
    if device.type == "cpu" and packs(DTYPES[options.dtype]):
        # An output layer that is the embedding table is held in an order of its own, and what is compiled all but twice.
        weights += int(found.tied * model_folder.DTYPE_BYTES[options.dtype])
        twice = ("compiled", "bfloat16", "none")
        weights *= 2 if (options.decode, options.dtype, options.quantization) == twice else 1
    return weights


def _kv_memory(options: LoadOptions) -> int:
    # A GPU's cache takes what is left there in the end; as much as a CPU's has to be.
    return CPU_KV_MEMORY if options.kv_memory is None else options.kv_memory


def _dtype(own: str | None, device: torch.device) -> str:
    """Choose a precision, where the model's own is `own`."""
    if device.type != "cpu":
        # float16 is no way out for what was trained as bfloat16: its largest number is too small for some models.
        return own if own in DTYPES and (own != "bfloat16" or _has_bfloat16(device)) else "float32"
    # Without instructions for 16-bit numbers float32 prefills 2.5 times faster than bfloat16, with them half as fast.
    return "bfloat16" if own == "bfloat16" and torch.cpu._is_avx512_bf16_supported() else "float32"


def _decode(options: LoadOptions, device: torch.device) -> str:
    """Choose how to decode, where that is left open."""
    if options.decode != "auto":
        return options.decode
    # Quantised layers wait for their device, and what is spread over several is on no one of them.
    fits = device.type == "cuda" and device != ALL_GPUS and options.quantization == "none"
    return "graph" if fits else "eager"


def _has_bfloat16(device: torch.device) -> bool:
    # A CPU computes with it in any case, if need be slowly; NVIDIA's GPUs do since Ampere.
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
