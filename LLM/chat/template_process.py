"""Processes that render chat templates, and that can be killed. What runs in them is in `template_worker.py`."""

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jinja2
import markupsafe

from LLM.chat.template_worker import LENGTH

log = logging.getLogger(__name__)

# The worker alone, isolated from the environment and from site-packages' start-up code.
PATHS = [str(Path(file).parents[1]) for file in (jinja2.__file__, markupsafe.__file__)] + [str(Path(__file__).parents[2])]
START = "import sys; sys.path += sys.argv[1:]; from LLM.chat.template_worker import main; main()"
COMMAND = [sys.executable, "-I", "-S", "-c", START, *dict.fromkeys(PATHS)]
START_SECONDS = 60.0  # for Python to start, on a busy machine
GLANCE_MS = 20  # how often a waiting thread looks whether it is still wanted
LONGEST_ANSWER, ANSWER_PER_BYTE = 32 << 20, 64  # bytes: what no worker says that does as it was written to
IDLE = 2  # processes that are kept


class Overrun(Exception):
    """The render took longer than it may."""


class Died(Exception):
    """The process ended in the middle of a render."""


class TemplateProcess:
    """One worker. It ends with its stdin, also when this process is killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={name: os.environ[name] for name in ("TZ",) if name in os.environ},
            start_new_session=True,  # a terminal's Ctrl-C is for the server
        )
        assert self._process.stdin, "a pipe was asked for"
        assert self._process.stdout, "a pipe was asked for"
        self.pid = self._process.pid
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._ready = False

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], seconds: float, check: Callable[[], object]) -> dict[str, Any]:
        """Send a request, and return the answer; `check` is called meanwhile, and ends it by raising.

        Raises:
            Overrun: there was no answer in so many seconds.
            Died: there is none to come.
        """
        if not self._ready:
            self._exchange(b"", START_SECONDS, check)
            self._ready = True
        payload = json.dumps({**request, "seconds": seconds}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        answer = self._exchange(LENGTH.pack(len(payload)) + payload, seconds, check)
        return cast("dict[str, Any]", json.loads(answer.decode("utf-8", "surrogatepass")))

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("process %d, which rendered a chat template, cannot be killed", self.pid)

    def _exchange(self, request: bytes, seconds: float, check: Callable[[], object]) -> bytes:
        deadline, todo, received = time.monotonic() + seconds, memoryview(request), bytearray()
        most = LONGEST_ANSWER + ANSWER_PER_BYTE * len(request)
        while (wanted := _length(received)) > len(received):
            check()
            if time.monotonic() > deadline:
                raise Overrun
            if wanted > most:
                raise Died
            todo = self._move(todo, received)
        return bytes(received[LENGTH.size :])

    def _move(self, todo: memoryview, received: bytearray) -> memoryview:
        """Write and read what can be written and read now, after a short wait; return what is left to write."""
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if todo:
            poll.register(self._in, select.POLLOUT)
        for descriptor, _ in poll.poll(GLANCE_MS):
            try:
                if descriptor == self._in:
                    todo = todo[os.write(self._in, todo) :]
                elif data := os.read(self._out, 1 << 20):
                    received += data
                else:
                    raise Died
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Died from None
        return todo


def _length(received: bytearray) -> int:
    """Return how long a frame is of which so much was received, its header included."""
    whole = LENGTH.size
    return whole + LENGTH.unpack(received[:whole])[0] if len(received) >= whole else whole


class TemplatePool:
    """As many processes as threads render at once; a few of them are kept."""

    def __init__(self) -> None:
        self._idle: deque[TemplateProcess] = deque()

    def render(
        self, template: str, values: Mapping[str, Any], seconds: float, check: Callable[[], object]
    ) -> dict[str, Any]:
        """Render in one of them, and return its answer; raises what `TemplateProcess.ask` raises."""
        process, kept = self._take()
        request = {"template": template, "values": values}
        try:
            answer = process.ask(request, seconds, check)
        except Died:
            process.kill()
            if not kept:
                raise
            return self.render(template, values, seconds, check)  # it had died before it was asked
        except BaseException:
            process.kill()
            raise
        if len(self._idle) < IDLE:
            self._idle.append(process)
        else:
            process.kill()
        return answer

    def _take(self) -> tuple[TemplateProcess, bool]:
        with contextlib.suppress(IndexError):
            while True:
                process = self._idle.pop()
                if process.alive:
                    return process, True
                process.kill()
        return TemplateProcess(), False


# One for all models of the process: what it keeps between renders is compiled templates only.
POOL = TemplatePool()
