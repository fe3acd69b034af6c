"""Where and how a model will be loaded: the device, the precision, and the memory that takes. Loads nothing."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from LLM import model_folder
from LLM._base_model_handler import LoadOptions, Plan
from LLM.errors import Refused

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU_KV_MEMORY = 1 << 30  # bytes, where the operator did not say
# What a container may have, in cgroups' version 2 and 1.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def plan(folder: Path, options: LoadOptions) -> Plan:
    """Say how the model in `folder` will be loaded, and what that takes.

    Raises:
        Refused: `unsupported` for options this machine cannot serve, `load_failed` for a folder that cannot be loaded.
    """
    found, device = model_folder.read(folder), device_of(options.device)
    dtype = options.dtype if options.dtype != "auto" else _dtype(found.dtype, device)
    weights = found.memory(dtype, options.quantization)
    if device.type == "cpu" and options.quantization == "none":
        # An output layer that is the embedding table is held in an order of its own, and what is compiled all but twice.
        weights += int(found.tied * model_folder.DTYPE_BYTES[dtype])
        weights *= 2 if options.decode == "compiled" and dtype == "bfloat16" else 1
    settled = replace(options, dtype=dtype, device=str(device))
    # A GPU's cache takes what is left there in the end; as much as a CPU's has to be.
    kv_memory = CPU_KV_MEMORY if options.kv_memory is None else options.kv_memory
    return Plan(settled, weights + kv_memory, memory_of(device))


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
    """Give the bytes that a device has, or of the machine's memory those that this process may use."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not in a container, or without a limit
            limits.append(int(Path(path).read_text()))
    return min(limits)


def cores() -> int:
    """Give how many cores this process may use, where that is known: a container often has a few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(own: str | None, device: torch.device) -> str:
    """Choose a precision, where the model's own is `own`."""
    if device.type != "cpu":
        return own if own in DTYPES else "float32"
    # Without instructions for 16-bit numbers float32 prefills 2.5 times faster than bfloat16, with them half as fast.
    return "bfloat16" if own == "bfloat16" and torch.cpu._is_avx512_bf16_supported() else "float32"
