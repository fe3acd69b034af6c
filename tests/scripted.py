"""A model whose every move the test decides: each decode step and each stage of a load waits for a permit.

What it says is what the echo model says: the prompt, token by token, then the end.
"""

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from LLM._base_model_handler import LoadedModel, LoadOptions, Plan, Progress
from LLM.engine.clock import Clock
from LLM.engine.request import Sampled
from LLM.engine.sequence import Slice
from LLM.listing import Listed
from LLM.model import Waiter
from LLM.model_service import ModelService
from LLM.model_srv_wsserver_echo import EchoRunner, ModelHandler
from tests.conftest import ECHO, Client, Running, eventually, running

STAGES = ("config", "weights", "warmup")
WIDE = "w" * 4096  # one token: text enough to fill an outbox in few steps


class Gate:
    """Where a thread waits until the test lets it pass; a permit lets it pass once."""

    def __init__(self, permits: float) -> None:
        self._permits = permits
        self._changed = threading.Condition()

    def let(self, passes: float = 1) -> None:
        """Give permits."""
        with self._changed:
            self._permits += passes
            self._changed.notify_all()

    def open(self) -> None:
        """Let everybody pass from now on."""
        self.let(math.inf)

    def shut(self) -> None:
        """Take back all permits."""
        with self._changed:
            self._permits = 0

    def enter(self) -> None:
        """Wait for a permit and use it up; called on the engine's thread."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._permits > 0, timeout=60):
                raise TimeoutError("the test never let this step pass")
            self._permits -= 1


class HastyClock(Clock):
    """Waits for nothing that only time brings."""

    async def pass_by(self, seconds: float) -> None:
        await asyncio.sleep(0)


class SetClock(Clock):
    """Goes as the real one does, and further when the test says so; what is to happen later happens only then."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._timers: list[SetTimer] = []

    def now(self) -> float:
        return super().now() + self._ahead

    def later(self, seconds: float, call: Callable[[], object]) -> "SetTimer":  # type: ignore[override]
        self._timers.append(SetTimer(self.now() + seconds, call))
        return self._timers[-1]

    def go(self, seconds: float) -> None:
        """Let so many seconds pass by, and happen what was to happen then."""
        self.set_forward(seconds)
        self.happen()

    def set_forward(self, seconds: float) -> None:
        """Let so many seconds pass by; what was to happen then is late."""
        self._ahead += seconds

    def happen(self) -> None:
        """Let happen what is due."""
        while due := [timer for timer in self.timers if timer.due <= self.now()]:
            first = min(due, key=lambda timer: timer.due)
            first.cancel()
            first.call()

    @property
    def timers(self) -> "list[SetTimer]":
        """What is still to happen."""
        self._timers = [timer for timer in self._timers if not timer.cancelled]
        return self._timers

    @property
    def ahead(self) -> list[int]:
        """In how many seconds, of which not one has begun."""
        return sorted(round(timer.due - self.now()) for timer in self.timers)


@dataclass(eq=False)
class SetTimer:
    """What happens when the test lets its time come."""

    due: float
    call: Callable[[], object]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class ScriptedModel(ModelHandler):
    """A drop-in and its runner in one. Its steps wait for permits; its loads do once the test has shut their gate."""

    memory_bytes, kv_bytes = 4711, 0
    # Without reuse, so that a test can say which tokens each step carries; `block_count` is for the test to set.
    block_count, block_size, reuses_blocks = 1 << 16, 16, False
    max_prefill = 256

    def __init__(self, context_length: int = 65536) -> None:
        self.step_gate = Gate(0)
        self.plan_gate = Gate(math.inf)
        self.load_gate = Gate(math.inf)
        self.encode_gates: dict[str, Gate] = {}  # of some prompts
        self.loads = 0
        self.load_stages = 0  # entered, over all loads
        self.load_gave_up = threading.Event()
        self.steps: list[list[Slice]] = []
        self.freed: list[Hashable] = []
        # What the next load or prompt raises; what a step raises or says instead, by its number, the first being 1.
        self.load_errors: list[BaseException] = []
        self.plan_errors: list[BaseException] = []
        # What a plan says: the device's memory, and what "auto" means.
        self.device_bytes = 0
        self.settles = {"auto": "auto"}
        self.encode_errors: list[BaseException] = []
        self.step_errors: dict[int, BaseException] = {}
        self.step_results: dict[int, list[Sampled | None]] = {}
        self.notes: list[str] = []
        self._context_length = context_length
        self._steps_before = 0
        self._echo = EchoRunner()

    def open(self) -> None:
        """Let everything run."""
        for gate in (self.step_gate, self.plan_gate, self.load_gate, *self.encode_gates.values()):
            gate.open()

    # The drop-in.

    def plan(self, folder: Path, options: LoadOptions) -> Plan:
        self.plan_gate.enter()
        if self.plan_errors:
            raise self.plan_errors.pop(0)
        settled = replace(options, dtype=self.settles.get(options.dtype, options.dtype), device="cpu")
        return Plan(settled, self.memory_bytes, self.device_bytes or 100 * self.memory_bytes)

    def load(self, folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
        self.loads += 1
        self._steps_before = len(self.steps)
        for number, stage in enumerate(STAGES):
            self._report(progress, stage, number / len(STAGES))
            self.load_stages += 1
            self.load_gate.enter()
        if self.load_errors:
            raise self.load_errors.pop(0)
        loaded = super().load(folder, options, progress)
        loaded.tokenizer.add_tokens([WIDE])
        vocabulary_size = loaded.tokenizer.get_vocab_size()
        return replace(loaded, runner=self, context_length=self._context_length, vocabulary_size=vocabulary_size)

    def _report(self, progress: Progress, stage: str, done: float) -> None:
        try:
            progress(stage, done)
        except BaseException:
            self.load_gave_up.set()
            raise

    def encode_prompt(self, model: LoadedModel, prompt: str) -> list[int]:
        if gate := self.encode_gates.get(prompt):
            gate.enter()
        if self.encode_errors:
            raise self.encode_errors.pop(0)
        return super().encode_prompt(model, prompt)

    # The runner.

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        self.steps.append(batch)
        number = len(self.steps)
        self.step_gate.enter()
        if number in self.step_errors:
            raise self.step_errors[number]
        return self.step_results.get(number) or self._echo.step(batch)

    def free(self, key: Hashable) -> None:
        self.freed.append(key)

    # What tests ask.

    async def in_step(self, number: int) -> None:
        """Wait until the engine has begun a step and stands before its gate."""
        await eventually(lambda: len(self.steps) >= number)

    async def in_load_stage(self, number: int) -> None:
        """Wait until a load has come to a stage and stands before its gate; stages are counted over all loads."""
        await eventually(lambda: self.load_stages >= number)

    async def in_step_of(self, id: str) -> None:
        """Wait until a client's id takes part in a step."""
        await eventually(lambda: bool(self.steps_of(id)))

    async def freed_of(self, id: str) -> None:
        """Wait until the engine has let go of a client's id."""
        await eventually(lambda: self.frees(id) > 0)

    def steps_of(self, id: str) -> list[tuple[int, int]]:
        """Give the slices, as (start, stop), of every step that a client's id took part in."""
        return [(part.start, part.stop) for batch in self.steps for part in batch if _id(part) == id]

    def held(self) -> set[Hashable]:
        """Give the requests that took part in a step since the last load and were never freed."""
        batches = self.steps[self._steps_before :]
        return {part.sequence.request.key for batch in batches for part in batch}.difference(self.freed)

    def frees(self, id: str) -> int:
        """Give how many times a client's id was freed."""
        return sum(key[1] == id for key in self.freed if isinstance(key, tuple))


@contextlib.asynccontextmanager
async def scripted(loaded: bool = True, **settings: Any) -> AsyncIterator[tuple[Running, ScriptedModel]]:
    """Serve with a scripted model in the place of the default one; all gates open at the end."""
    async with running(**settings) as server:
        model = put(server.models, ECHO)
        try:
            if loaded:
                await server.models.get(server.models.resolve(), Waiter())
            yield server, model
        finally:
            for listed in server.models.listing.values():
                if isinstance(listed.handler, _Given):
                    listed.handler.model.open()


def put(models: ModelService, name: str, model: ScriptedModel | None = None) -> ScriptedModel:
    """List a scripted model under a name, and give it."""
    model = model or ScriptedModel()
    models.listing[name] = Listed(name, _Given(model), Path())
    return model


@contextlib.asynccontextmanager
async def slow_client(server: Running, **options: Any) -> AsyncIterator[Client]:
    """Connect a client with little room for unread bytes, so that it is soon felt when it does not read."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.server.port))
        async with server.client(sock=sock, **options) as client:
            try:
                yield client
            finally:
                client.socket.transport.resume_reading()


async def closing_code(client: Client) -> int:
    """Read on to the end of the connection; give the code the server closed it with."""
    with pytest.raises(ConnectionClosed) as closed:
        await client.until("nothing comes any more")
    assert closed.value.rcvd, "cut off without a close frame"
    return closed.value.rcvd.code


async def in_engine(server: Running, requests: int) -> None:
    """Wait until so many requests are with the engines of loaded models, running or in line."""
    async with asyncio.timeout(30):
        while sum(entry["active"] + entry["queued"] for entry in server.models.status()) != requests:
            # A loop that never rests would keep the interpreter from the threads that read the prompts.
            await asyncio.to_thread(bool)


class _Given:
    """Stands in the listing for a handler class; "makes" the one model that the test holds."""

    def __init__(self, model: ScriptedModel) -> None:
        self.model = model

    def __call__(self) -> ScriptedModel:
        return self.model


def _id(part: Slice) -> str:
    _session, id, *_ = part.sequence.request.key
    return id
