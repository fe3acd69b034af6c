"""Libraries without a server: a child process of ours calls them, and tells when each piece of text was there.

Both halves are here: what the bench holds, and `serve`, which the child's module calls. The child takes the times itself
(the monotonic clock is the machine's, not the process's), so these peers pay for no transport.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from typing import Any, TextIO

from bench.load import Request
from bench.measure import Trace
from bench.sides.process import Process, SideFailed
from bench.sides.side import Setting, Side


class InProcess(Side):
    """The bench's half."""

    def __init__(self, name: str, setting: Setting, module: str, *arguments: str, needs: tuple[str, ...] = ()) -> None:
        super().__init__(name, setting)
        self.needs = needs
        self._command = (module, json.dumps(asdict(setting)), *arguments)
        self._ids = count()
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def start(self) -> None:
        """Start the child; see `Side.start`."""
        threads = self.setting.threads
        self.process = await Process.spawn(self.name, *self._command, threads=threads, on_line=self._on_line)
        await self.process.wait_for("^ready$")

    async def stream(self, request: Request) -> Trace:
        """Hand the request to the child, which keeps its own queue; see `Side.stream`."""
        id, sent = next(self._ids), time.monotonic()
        answer = self._open[id] = asyncio.get_running_loop().create_future()
        self.process.write(json.dumps({"id": id, "prompt": request.prompt, "max_tokens": request.max_tokens}))
        ended = asyncio.ensure_future(self.process.ended())
        await asyncio.wait([answer, ended], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not answer.done():
            raise SideFailed(f"{self.name} ended: {self.process.last_words()}")
        told = answer.result()
        if told["completion_tokens"] != request.max_tokens:
            raise SideFailed(f"{self.name}: wanted {request.max_tokens} tokens, got {told['completion_tokens']}")
        arrivals = tuple(told["arrivals"])
        return Trace(sent, arrivals, told["ended"], told["prompt_tokens"], told["completion_tokens"])

    def _on_line(self, line: str) -> None:
        told = json.loads(line)
        self._open.pop(told["id"]).set_result(told)


# The child's half.


class Job:
    """One request in the child: mark every piece of text as it comes, then say that it is done."""

    def __init__(self, id: int, prompt: str, max_tokens: int, results: TextIO) -> None:
        self.id = id
        self.prompt = prompt
        self.max_tokens = max_tokens
        self._arrivals: list[float] = []
        self._results = results

    def arrived(self) -> None:
        """Say that a piece of text is there."""
        self._arrivals.append(time.monotonic())

    def done(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Say that the answer is complete."""
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        told = {"id": self.id, "arrivals": self._arrivals, "ended": time.monotonic(), **counts}
        self._results.write(json.dumps(told) + "\n")
        self._results.flush()


def serve(load: Callable[[Setting], Callable[[Job], None]]) -> None:
    """Load a model, then hand every request to what `load` gave, in order; a job may be done later than its call."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    run = load(Setting(**json.loads(sys.argv[1])))
    results.write("ready\n")
    results.flush()
    for job in _jobs(results):
        run(job)


def _jobs(results: TextIO) -> Iterator[Job]:
    for line in sys.stdin:
        yield Job(**json.loads(line), results=results)
