"""What a process does with memory around loads: libraries are left out of collections, and freed pages are given back."""

import ctypes
import gc
from collections.abc import Callable
from functools import cache


@cache
def freeze_libraries() -> None:
    """Leave all that is there out of full collections, once per process and before its first model is built.

    By then the libraries are imported, several hundred thousand objects: a full collection looked at each of them, 0.2 s
    in which no stream moves. What is frozen is never freed, so nothing of a model may be.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Free what only a collection finds, and give free pages to the system: glibc keeps those of its threads' arenas."""
    gc.collect()
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's function, https://man7.org/linux/man-pages/man3/malloc_trim.3.html; None where there is none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return trim
