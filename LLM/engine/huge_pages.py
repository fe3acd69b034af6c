"""The weights' memory in huge pages, where Linux has them: a step that reads all of it then looks up fewer addresses.

Knows nothing of models. What cannot be moved stays as it is, and nothing depends on it.
"""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20
MADV_COLLAPSE = 25  # https://man7.org/linux/man-pages/man2/madvise.2.html, since Linux 6.1


def move_to_huge_pages(tensors: Iterable[Tensor], progress: Callable[[float], None]) -> None:
    """Move the memory of a CPU's tensors, about 2 ms for each 2 MiB; `progress` is told the share that is done."""
    if not sys.platform.startswith("linux"):
        return
    pages = sorted({page for tensor in tensors if tensor.device.type == "cpu" for page in _pages(tensor)})
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for done, page in enumerate(pages):
        progress(done / len(pages))
        # Refused where a page is not wholly this process' own memory, as at the ends of what was allocated.
        moved += madvise(page, HUGE_PAGE, MADV_COLLAPSE) == 0
    log.debug("%d of %d pieces of the weights' memory are in huge pages", moved, len(pages))


def _pages(tensor: Tensor) -> range:
    start = torch.ops.mkldnn.data_ptr(tensor) if tensor.is_mkldnn else tensor.data_ptr()
    return range(start // HUGE_PAGE * HUGE_PAGE, start + tensor.nbytes, HUGE_PAGE)
