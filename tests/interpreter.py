"""A process in which Triton interprets its kernels on the CPU. It decides that once, when it is imported."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version


@contextlib.contextmanager
def interpreting() -> Iterator[Callable[..., Any]]:
    """Give what calls a function, with its arguments, in a process where kernels are interpreted."""
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("Triton's interpreter knows NumPy 2.4 from 3.7 on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            yield lambda function, *arguments: executor.submit(function, *arguments).result()
