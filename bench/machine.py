"""What the figures were measured on, and the floor under them: the bytes that a decode step cannot do without."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
from safetensors import safe_open

from bench.sides.process import ROOT, environment

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
PACKAGES = ("torch", "transformers", "triton", "websockets", "uvloop", "llama-cpp-python")


def describe() -> str:
    """Give one line: processor, memory, versions, commit."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    parts = [_processor(), f"{os.cpu_count()} cores", memory, platform.system()]
    if has_gpu():
        parts.insert(0, _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"))
    versions = [f"Python {platform.python_version()}", *(f"{p} {v}" for p in PACKAGES if (v := _version(p)))]
    return ", ".join([*parts, *versions, f"commit {_commit()}"])


def has_gpu() -> bool:
    """Whether there is a GPU that CUDA could use."""
    return bool(_output("nvidia-smi", "-L"))


def read_rate(threads: int, device: str) -> tuple[float, str]:
    """Give the bytes per second that this machine, with so many threads, or its GPU reads, and how they were read."""
    command = [sys.executable, "-m", "bench.bandwidth", str(threads), device]
    settings = os.environ | environment(threads)
    found = json.loads(subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, check=True).stdout)
    return found["bytes_per_s"], found["way"]


def now() -> str:
    """Give the date and time in UTC, and how busy the machine is besides: figures from a busy one are no good."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{date}, load average {os.getloadavg()[0]:.2f}"


def step_bytes(folder: Path, dtype: str, streams: int, context: int) -> float:
    """Give the bytes that one decode step of so many streams with so many tokens each must read, weights and KV cache."""
    config = json.loads((folder / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    numbers: int = _weights(folder, config["tie_word_embeddings"]) + streams * context * kv
    return DTYPE_BYTES[dtype] * numbers


def _weights(folder: Path, tied: bool) -> int:
    """Count the weights that every step reads: all but an embedding that is not the output projection too."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - an open safetensors file is no mapping
                shape = tensors.get_slice(name).get_shape()
                if tied or "embed_tokens" not in name:
                    count += math.prod(shape)
    return count


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in info.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name", platform.machine())
    numbers = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{name} ({numbers}; {' '.join(flag for flag in FLAGS if flag in flags)})"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    dirty = "+" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return f"{_output('git', 'rev-parse', '--short', 'HEAD') or 'unknown'}{dirty}"


def _output(*command: str) -> str:
    """Give what a command prints, nothing if it is not there."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
