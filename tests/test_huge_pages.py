"""Memory that moves to huge pages: its numbers stay what they are at any moment, and what cannot move does no harm."""

import ctypes
import logging
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from torch import Tensor

from LLM.engine import huge_pages
from LLM.engine.huge_pages import HUGE_PAGE, MADV_COLLAPSE, move_to_huge_pages

PATIENCE = 30.0
ROWS, COLUMNS = 2048, 1024  # of float32: 8 MiB


def plain(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, COLUMNS)


def packed(rows: int = ROWS) -> Tensor:
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this torch cannot pack weights")
    return torch.ops.mkldnn._reorder_linear_weight(plain(rows))


def address(tensor: Tensor) -> int:
    return torch.ops.mkldnn.data_ptr(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def numbers(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def silent(share: float) -> None:
    """Hear of progress, and say nothing."""


def why_nothing_moves() -> str | None:
    """Give why this system moves no memory to huge pages; None if it does."""
    if not sys.platform.startswith("linux"):
        return "only Linux has madvise's MADV_COLLAPSE"
    memory = mmap.mmap(-1, 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # It stays mapped as long as this refers to it.
    first = ctypes.c_char.from_buffer(memory)
    memory.write(b"x" * 2 * HUGE_PAGE)
    page = -(-ctypes.addressof(first) // HUGE_PAGE) * HUGE_PAGE
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if madvise(page, HUGE_PAGE, MADV_COLLAPSE) == 0:
        return None
    return f"MADV_COLLAPSE does not work here: {os.strerror(ctypes.get_errno())}"


@contextmanager
def mappings_of_its_own(tensor: Tensor) -> Iterator[range]:
    """Give the addresses of mappings that are all whole pages of a tensor, and nothing else, while the context lasts."""
    start = -(-address(tensor) // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address(tensor) + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # Linux makes one mapping of neighbours unless their flags differ, and what lies beside the tensor moves when it likes.
    assert madvise(start, size, mmap.MADV_DONTFORK) == 0
    yield range(start, start + size)
    assert madvise(start, size, mmap.MADV_DOFORK) == 0


def huge_bytes(addresses: range) -> int:
    """Give how much of the mappings that begin at some addresses is in huge pages."""
    huge, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if begins := re.match(r"([0-9a-f]+)-", line):
            mine = int(begins[1], 16) in addresses
        elif mine and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) * 1024
    return huge


@pytest.mark.parametrize("make", [plain, packed])
def test_numbers_stay_the_same_for_whoever_reads_them_meanwhile(make: Callable[[], Tensor]):
    tensor = make()
    expected = numbers(tensor).clone()
    reading, moved, right = Event(), Event(), []

    def read() -> None:
        while not moved.is_set():
            right.append(torch.equal(numbers(tensor), expected))
            reading.set()

    reader = Thread(target=read)
    reader.start()
    try:
        assert reading.wait(PATIENCE)
        for _ in range(3):
            move_to_huge_pages([tensor], silent)
    finally:
        moved.set()
        reader.join(PATIENCE)
    assert all(right)
    assert torch.equal(numbers(tensor), expected)


@pytest.mark.parametrize("make", [plain, packed])
def test_memory_moves_to_huge_pages(make: Callable[[], Tensor], caplog: pytest.LogCaptureFixture):
    if why := why_nothing_moves():
        pytest.skip(why)
    tensor = make()
    with mappings_of_its_own(tensor) as addresses, caplog.at_level(logging.DEBUG, logger=huge_pages.__name__):
        move_to_huge_pages([tensor], silent)
        huge = huge_bytes(addresses)
    # How many could be moved depends on how fragmented the machine's memory is; the two ends lie in two mappings each.
    moved = int(caplog.messages[0].partition(" of ")[0])
    assert huge > 0
    assert moved - 2 <= huge // HUGE_PAGE <= moved


def test_every_piece_is_moved_once(caplog: pytest.LogCaptureFixture):
    if not sys.platform.startswith("linux"):
        pytest.skip("nothing moves but on Linux")
    tensor = plain()
    pieces = (address(tensor) + tensor.nbytes - 1) // HUGE_PAGE - address(tensor) // HUGE_PAGE + 1
    with caplog.at_level(logging.DEBUG, logger=huge_pages.__name__):
        move_to_huge_pages((tensor, tensor[3:], *tensor.split(100), tensor.T), silent)
    assert f"of {pieces} pieces" in caplog.text


def test_its_progress_is_told():
    if not sys.platform.startswith("linux"):
        pytest.skip("nothing moves but on Linux")
    told: list[float] = []
    move_to_huge_pages([plain()], told.append)
    assert told == sorted(told)
    assert told[0] == 0
    assert 0.5 < told[-1] < 1


def test_there_is_nothing_to_do_but_on_linux(monkeypatch: pytest.MonkeyPatch):
    told: list[float] = []
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        move_to_huge_pages([plain()], told.append)
    assert told == []


@pytest.mark.parametrize(
    "tensors",
    [[], [torch.empty(ROWS, COLUMNS, device="meta")], [torch.empty(0)], [torch.empty(ROWS, COLUMNS, device="meta")[:0]]],
)
def test_tensors_without_memory_are_nothing_to_move(tensors: list[Tensor], caplog: pytest.LogCaptureFixture):
    if not sys.platform.startswith("linux"):
        pytest.skip("nothing moves but on Linux")
    with caplog.at_level(logging.DEBUG, logger=huge_pages.__name__):
        move_to_huge_pages(tensors, silent)
    assert "0 of 0 pieces" in caplog.text
