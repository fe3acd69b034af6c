"""One model from the moment somebody asks for it: its load, those who wait, its engine. Knows no other model."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from LLM._base_model_handler import BaseModelHandler, ChatMessage, GenerationOptions, LoadedModel, LoadOptions
from LLM.engine.line import Line
from LLM.engine.request import GenerationRequest
from LLM.engine.retry import bounded
from LLM.engine.step import Runner
from LLM.engine.thread import GenerationEngine
from LLM.errors import Refused

log = logging.getLogger(__name__)

FAILED = "the model failed to load; the server's operator finds the details in its log"
PROGRESS_INTERVAL = 0.2  # seconds between two reports of one stage's progress


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model, loaded how: the identity of a loaded model."""

    model: str
    options: LoadOptions


class Description(TypedDict):
    """What a client is told of the model it uses."""

    id: str
    context_length: int
    dtype: str
    quantization: str
    device: str


class Waiter:
    """One who waits for a load: told of its progress, and of his place in line if he stands in it.

    The line is fair between owners.
    """

    def __init__(
        self,
        on_progress: Callable[[str, float], None] | None = None,
        on_position: Callable[[int], None] | None = None,
        owner: Hashable = None,
    ) -> None:
        self.on_progress = on_progress
        self.on_position = on_position
        self.owner = owner


class Abandoned(Exception):
    """The load was given up because nobody waited for it any more."""


class Model:
    """A model that is loaded or being loaded, on an engine of its own."""

    def __init__(
        self,
        spec: ModelSpec,
        handler: BaseModelHandler,
        folder: Path,
        engine: GenerationEngine,
        planned_bytes: int,
        on_failed_load: "Callable[[Model], None]",
        after: "Collection[asyncio.Task[None]]" = (),
    ) -> None:
        self.spec = spec
        self.engine = engine
        # Who uses it, so that it stays; since when nobody does; and what will unload it then.
        self.users = 0
        self.left_at: float | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self._handler = handler
        self._planned_bytes = planned_bytes
        self._after = after
        self._folder = folder
        self._loaded: LoadedModel | None = None
        self._stage, self._progress = "config", 0.0
        self._began = time.monotonic()
        # Each with what turns it away.
        self._waiters: dict[Waiter, asyncio.Future[Refused]] = {}
        self._line: Line[Waiter] = Line()
        self._telling = False
        self._on_failed_load = on_failed_load
        self._load = asyncio.create_task(self._load_on_engine())
        self._load.add_done_callback(self._load_ended)

    @property
    def name(self) -> str:
        """The model's id."""
        return self.spec.model

    @property
    def device(self) -> str:
        """Where it runs or will run."""
        return self._loaded.device if self._loaded else self.spec.options.device

    @property
    def memory_bytes(self) -> int:
        """What it takes there, as far as that is known."""
        return self._loaded.runner.memory_bytes if self._loaded else self._planned_bytes

    @property
    def failed(self) -> bool:
        """Whether it can no longer serve: its load failed, or its engine died."""
        return self._load.done() and self.engine.dead

    async def wait(self, waiter: Waiter) -> None:
        """Wait until the model is loaded; leaving is by asyncio's cancellation, and the last one to leave ends the load.

        Raises:
            Refused: why the load failed, or that too many wait for it.
            Abandoned: the load had been given up before this one came to wait.
        """
        if not self._load.done():
            await self._stand_by(waiter)
        self._load.result()

    async def request(
        self, key: Hashable, prompt: str | Sequence[ChatMessage], options: GenerationOptions
    ) -> GenerationRequest:
        """Make a prompt's token ids, in a thread because a long text takes long, and join them with the defaults.

        Raises:
            Refused: why this model cannot serve the request.
        """
        assert self._loaded is not None, "a model is asked for requests once it is loaded"
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(self._handler.encode_prompt, self._loaded, prompt)
        else:
            ids = await asyncio.to_thread(self._handler.encode_chat, self._loaded, prompt)
        return self._handler.request(self._loaded, key, ids, options)

    def describe(self) -> Description:
        """Give what a client is told of the model it will use."""
        loaded = self._loaded
        return {
            "id": self.spec.model,
            "context_length": loaded.context_length if loaded else 0,
            "dtype": loaded.dtype if loaded else self.spec.options.dtype,
            "quantization": self.spec.options.quantization,
            "device": self.device,
        }

    def status(self) -> dict[str, object]:
        """Give this model's entry in the status of the server."""
        state = "failed" if self.failed else "ready" if self._load.done() else "loading"
        return {
            **self.describe(),
            "state": state,
            **({"stage": self._stage, "progress": self._progress} if state == "loading" else {}),
            **(_memory_and_notes(self._loaded.runner) if self._loaded else {"memory_bytes": 0}),
            "active": self.engine.active,
            "queued": self.engine.queued + len(self._line),
            "capacity": self.engine.capacity,
            "tokens_per_s": round(self.engine.tokens_per_s, 1),
        }

    async def close(self) -> None:
        """End the load, or the engine with everything in it; nothing of the model is held any more."""
        self._load.cancel()
        await self.engine.close()
        on_unloaded, self._loaded = self._loaded and self._loaded.on_unloaded, None
        if on_unloaded:
            await asyncio.to_thread(on_unloaded)

    async def _load_on_engine(self) -> None:
        loop = asyncio.get_running_loop()
        told = ("", 0.0)

        def progress(stage: str, done: float) -> None:
            # Called on the engine's thread. To abort is to raise here: nothing else can end a load from outside.
            if not self._waiters:
                raise Abandoned
            nonlocal told
            if stage != told[0]:
                self.engine.give_way()
            if stage != told[0] or time.monotonic() - told[1] >= PROGRESS_INTERVAL:
                told = stage, time.monotonic()
                loop.call_soon_threadsafe(self._tell_progress, stage, done)

        if self._after:
            await asyncio.wait(self._after)
        began = time.monotonic()
        try:
            self._loaded = await self.engine.start(lambda: self._handler.load(self._folder, self.spec.options, progress))
        except Abandoned:
            log.info("gave up loading %s: nobody waits for it any more", self.spec.model)
            raise
        except Refused as error:
            log.error("cannot load %s: %s", self.spec.model, error.message, exc_info=error.__cause__)
            raise
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic in Rust code, of the tokenizer or of safetensors, is no Exception
            log.exception("loading %s failed", self.spec.model)
            raise Refused("load_failed", FAILED) from error
        loaded, took = self._loaded, time.monotonic() - began
        how = (loaded.dtype, self.spec.options.quantization, loaded.device)
        log.info("loaded %s as %s, quantization %s, on %s in %.1f s", self.spec.model, *how, took)

    def _load_ended(self, load: asyncio.Task[None]) -> None:
        # Also when nobody waits any more to hear of it.
        if load.cancelled() or load.exception():
            self._on_failed_load(self)

    def _tell_progress(self, stage: str, done: float) -> None:
        self._stage, self._progress = stage, done
        for waiter in self._waiters:
            if waiter.on_progress:
                waiter.on_progress(stage, done)

    async def _stand_by(self, waiter: Waiter) -> None:
        turned_away = self._waiters[waiter] = asyncio.get_running_loop().create_future()
        if waiter.on_position:
            self._join_line(waiter)
        try:
            await asyncio.wait([self._load, turned_away], return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._waiters[waiter]
            self._leave_line(waiter)
        if not self._load.done():
            raise turned_away.result()

    def _join_line(self, waiter: Waiter) -> None:
        self._line.join(waiter, waiter.owner)
        last = self._line.last
        if last and len(self._line) > self.engine.max_queue:
            self._leave_line(last)
            # How long it still takes nobody knows; as long again as until now is a guess that grows with what it is about.
            seconds = bounded(time.monotonic() - self._began)
            most = f"{self.engine.max_queue} requests may wait for this model while it is loaded, and they do"
            message = f"{most}; try again in {seconds:.1f} s"
            self._waiters[last].set_result(Refused("overloaded", message, retry_after=seconds))
        self._line_moved()

    def _leave_line(self, waiter: Waiter) -> None:
        if self._line.leave(waiter):
            self._line_moved()

    def _line_moved(self) -> None:
        # Once a turn of the loop: many who leave together must not each have everybody behind them told.
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell_positions)

    def _tell_positions(self) -> None:
        self._telling = False
        if self._load.done():
            return  # nobody waits any more, they only have not been woken yet
        for waiter, position in self._line.moved():
            if waiter.on_position:
                waiter.on_position(position)


def _memory_and_notes(runner: Runner) -> dict[str, object]:
    kv_cache = {"tokens": runner.block_count * runner.block_size, "bytes": runner.kv_bytes}
    return {
        "memory_bytes": runner.memory_bytes,
        **({"kv_cache": kv_cache} if runner.kv_bytes else {}),
        **({"notes": runner.notes} if runner.notes else {}),
    }
