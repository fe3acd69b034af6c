"""Measures how fast this machine reads memory, with so many threads: `python -m bench.bandwidth THREADS DEVICE`.

The floor of every decode step is what it must read, so this is what its share is counted against. Two ways of reading
memory once are tried, each several times, and the fastest counts: what one of them reaches, a decode step could.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # far more than any cache holds
TIMES = 8


def measure(threads: int, device: str) -> tuple[float, str]:
    """Give the bytes per second, and how they were read."""
    torch.set_num_threads(threads)
    numbers = torch.ones(BYTES[torch.device(device).type] // 4, device=device)
    matrix, vector = numbers.view(-1, 4096), numbers[:4096]
    ways: dict[str, Callable[[], Tensor]] = {
        "float32 sum": numbers.sum,
        "float32 matrix by vector": lambda: matrix @ vector,
    }
    seconds = {name: min(_seconds(read) for _ in range(TIMES)) for name, read in ways.items()}
    best = min(seconds, key=seconds.__getitem__)
    return numbers.nbytes / seconds[best], best


def _seconds(read: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    read().flatten()[0].item()  # which waits for a GPU
    return time.perf_counter() - began


if __name__ == "__main__":
    rate, way = measure(int(sys.argv[1]), sys.argv[2])
    print(json.dumps({"bytes_per_s": rate, "way": way}))
