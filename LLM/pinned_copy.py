"""Brings tensors to a GPU through pinned memory: from a file's own pages the driver would copy them several times slower."""

from collections.abc import Iterator
from itertools import cycle
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

PIECE = 16 << 20  # bytes


class Lane:
    """Two pieces of pinned memory, of which one is filled while the other one is on its way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        pieces = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._turns: Iterator[tuple[Tensor, torch.cuda.Event | None]] = cycle(
            [(piece, torch.cuda.Event() if on_gpu else None) for piece in pieces]  # type: ignore[no-untyped-call]
        )

    def bring(self, tensor: Tensor) -> Tensor:
        """Give a copy of a tensor of the CPU's on the device, which is there for what the device does next."""
        brought = torch.empty_like(tensor, device=self._device, memory_format=torch.contiguous_format)
        source, target = (t.reshape(-1).view(torch.uint8) for t in (tensor, brought))
        for start in range(0, tensor.nbytes, PIECE):
            part, (piece, gone) = source[start : start + PIECE], next(self._turns)
            if gone:
                gone.synchronize()
            piece[: len(part)].copy_(part)
            target[start : start + PIECE].copy_(piece[: len(part)], non_blocking=True)
            if gone:
                gone.record(torch.cuda.current_stream(self._device))
        return brought


class PinnedCopy:
    """Copies for several threads at once, each of which has a lane meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: SimpleQueue[Lane] = SimpleQueue()

    def __call__(self, tensor: Tensor) -> Tensor:
        """Give a copy of a tensor of the CPU's on the device."""
        try:
            lane = self._idle.get_nowait()
        except Empty:
            lane = Lane(self._device)
        brought = lane.bring(tensor)
        self._idle.put(lane)
        return brought
