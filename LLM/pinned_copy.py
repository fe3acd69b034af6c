"""Reads tensors to a GPU through pinned memory: from any other the driver would copy them several times slower."""

from collections.abc import Iterator
from itertools import cycle
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from LLM.stored_weights import Fill

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

    def bring(self, size: int, fill: Fill) -> Tensor:
        """Give bytes on the device, which are there for what the device does next."""
        brought = torch.empty(size, dtype=torch.uint8, device=self._device)
        for start in range(0, size, PIECE):
            piece, gone = next(self._turns)
            if gone:
                gone.synchronize()
            part = piece[: min(PIECE, size - start)]
            fill(part, start)
            brought[start : start + PIECE].copy_(part, non_blocking=True)
            if gone:
                gone.record(torch.cuda.current_stream(self._device))
        return brought


class PinnedCopy:
    """Copies for several threads at once, each of which has a lane meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: SimpleQueue[Lane] = SimpleQueue()

    def __call__(self, size: int, fill: Fill) -> Tensor:
        """Give bytes on the device, read by `fill`."""
        try:
            lane = self._idle.get_nowait()
        except Empty:
            lane = Lane(self._device)
        brought = lane.bring(size, fill)
        self._idle.put(lane)
        return brought
