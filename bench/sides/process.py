"""A process of its own for each side: started, waited for by a line it prints, its CPU time read, and stopped."""

import asyncio
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent
CACHE = ROOT / "bench" / ".cache"

START_TIMEOUT = 300.0  # seconds for a side to be ready
STOP_TIMEOUT = 15.0  # seconds for it to end by itself
LINE_LIMIT = 2**24  # bytes: a trace of a long answer is one line


class SideFailed(Exception):
    """A side did not start, ended early or answered something else than what was asked; the message says which."""


class Process:
    """A running Python module, and what it prints."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log: Path, on_line: Callable[[str], None] | None
    ) -> None:
        self.name = name
        self._log = log
        self._process = process
        self._on_line = on_line
        self._awaited: tuple[re.Pattern[str], asyncio.Future[re.Match[str]]] | None = None
        self._reader: asyncio.Task[None]

    @classmethod
    async def spawn(
        cls, name: str, module: str, *arguments: str, threads: int, on_line: Callable[[str], None] | None = None
    ) -> "Process":
        """Start `python -m module` with so many compute threads; `on_line` gets every line it prints to its stdout."""
        CACHE.mkdir(exist_ok=True)
        path = CACHE / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.log"
        with path.open("w") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Two writers of one pipe cut into each other's long lines.
                stderr=log if on_line else asyncio.subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | environment(threads),
                limit=LINE_LIMIT,
            )
        self = cls(name, process, path, on_line)
        self._reader = asyncio.create_task(self._read())
        return self

    async def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until it prints a line in which `pattern` is found; to be called before it can have printed it.

        Raises:
            SideFailed: it ended, or took too long.
        """
        line = asyncio.get_running_loop().create_future()
        self._awaited = (re.compile(pattern), line)
        await asyncio.wait([line, self._reader], timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if not line.done():
            raise SideFailed(f"{self.name} did not start: {self.last_words()}")
        found: re.Match[str] = line.result()
        return found

    def write(self, line: str) -> None:
        """Give it a line on its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def ended(self) -> None:
        """Wait until it has closed its stdout."""
        await asyncio.wait([self._reader])

    def last_words(self) -> str:
        """Give the last line of its log that says anything."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1].strip()[:160]} ({self._log.name})" if lines else "it printed nothing"

    def cpu_seconds(self) -> float:
        """Give the CPU time, user and system, that it and its children have used."""
        process = psutil.Process(self._process.pid)
        times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
        return float(sum(t.user + t.system for t in times))

    def resident(self) -> int:
        """Give the bytes of memory that it has just now, without its children."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    async def stop(self) -> None:
        """End it, if need be by force."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self.ended()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for data in self._process.stdout:
            line = data.decode(errors="replace").rstrip("\n")
            if self._awaited and not self._awaited[1].done() and (found := self._awaited[0].search(line)):
                self._awaited[1].set_result(found)
            elif self._on_line:
                self._on_line(line)
            else:
                with self._log.open("a") as log:
                    log.write(line + "\n")


def environment(threads: int) -> dict[str, str]:
    """Give the variables that keep a process to so many compute threads, and away from the network."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **dict.fromkeys(pools, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def may_open(count: int) -> bool:
    """Let this process, and those it starts, open so many files and some more, if the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, count + 200)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True
