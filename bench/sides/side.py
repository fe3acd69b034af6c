"""What the bench asks of a side: to start, to stream requests, to stop. Knows no measurement."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.load import Request
from bench.measure import Trace
from bench.sides.process import ROOT, Process


@dataclass(frozen=True, slots=True)
class Setting:
    """Which model every side is to run, and how."""

    model: str  # the id of a folder under LLM/
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    streams: int = 1  # how many requests may run at once
    decode: str = "eager"  # how our server decodes

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return ROOT / "LLM" / self.model


class Side(ABC):
    """One server or library under measurement, in a process of its own."""

    # Packages that must be there for it to run.
    needs: Sequence[str] = ()

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.setting = setting
        self.process: Process

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        lacking = [package for package in self.needs if find_spec(package) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else None

    @abstractmethod
    async def start(self) -> None:
        """Start its process; returns once it takes requests.

        Raises:
            SideFailed: it does not.
        """

    @abstractmethod
    async def stream(self, request: Request) -> Trace:
        """Run one request to its end; several may run at once.

        Raises:
            SideFailed: the answer is not what was asked for.
        """

    async def stop(self) -> None:
        """End its process."""
        await self.process.stop()


@asynccontextmanager
async def running(make: Callable[[], Side]) -> AsyncIterator[Side]:
    """Start a side, and stop it whatever happens."""
    side = make()
    try:
        await side.start()
        yield side
    finally:
        if hasattr(side, "process"):
            await side.stop()
