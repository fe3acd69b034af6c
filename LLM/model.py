"""One model from the moment somebody asks for it: its load, those who wait, its engine. Knows no other model."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypedDict, cast

from LLM._base_model_handler import BaseModelHandler, ChatMessage, GenerationOptions, LoadedModel, LoadOptions
from LLM.blocking import BlockingCalls
from LLM.chat.reading import Reading
from LLM.engine.clock import Clock
from LLM.engine.request import GenerationRequest
from LLM.engine.step import Runner
from LLM.engine.thread import STOPPED, GenerationEngine
from LLM.errors import Refused
from LLM.lifecycle.tenants import Tenants
from LLM.restarts import Restarts
from LLM.waiters import Waiter as Waiter
from LLM.waiters import Waiters

log = logging.getLogger(__name__)

TOO_LONG = "loading the model took longer than the {:g} s that --load-timeout allows; use another one, or tell the operator"
FAILED = "the model failed to load; the server's operator finds the details in its log"
PROGRESS_INTERVAL = 0.2  # seconds between two reports of one stage's progress

# What happens to a model, for whoever wants to hear of it.
Event = Literal["loading", "ready", "load_failed", "died", "unloaded"]
State = Literal["loading", "ready", "failed", "restarting"]
PROBLEMS: dict[State, str | None] = {
    "ready": None,
    "loading": "is loading",
    "failed": "failed; the next request loads it anew",
    "restarting": "is restarting",
}


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
        on_change: "Callable[[Model], None]",
        restarts: Restarts,
        clock: Clock,
        texts: BlockingCalls,
        tenants: Tenants,
        load_timeout: float,
        after: "Collection[asyncio.Task[None]]" = (),
    ) -> None:
        self.spec = spec
        self.engine = engine
        self.restarts = restarts
        # Who uses it, so that it stays; since when nobody does; and what will unload it then.
        self.tenants = tenants
        self.unused_since: float | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self._handler = handler
        self._planned_bytes = planned_bytes
        self._load_timeout = load_timeout
        self._after = after
        self._texts = texts
        self._folder = folder
        self._loaded: LoadedModel | None = None
        self._description = _describe(spec)
        # None as long as the load must not begin yet.
        self._stage: str | None = None if restarts.down else "config"
        self._progress = 0.0
        self._clock = clock
        self._waiters = Waiters(engine.max_queue, clock)
        self._on_change = on_change
        self._load = asyncio.create_task(self._load_on_engine())
        self._load.add_done_callback(self._load_ended)

    @property
    def name(self) -> str:
        """The model's id."""
        return self.spec.model

    @property
    def device(self) -> str:
        """Where it runs or will run."""
        return self._description["device"]

    @property
    def memory_bytes(self) -> int:
        """What it takes there, as far as that is known; nothing once it was closed."""
        if self._loaded:
            return self._loaded.runner.memory_bytes
        return 0 if self._load.done() and not self.engine.stuck else self._planned_bytes

    @property
    def left_at(self) -> float | None:
        """When its last user left it; None while somebody uses it, or it is to stay, or its engine hangs and holds it."""
        return None if self.engine.stuck or self.pinned else self.unused_since

    @property
    def pinned(self) -> bool:
        """Whether it leaves for no other one."""
        return self.tenants.pinned

    @property
    def failed(self) -> bool:
        """Whether it can no longer serve: its load failed, or its engine died."""
        return self._load.done() and self.engine.dead

    @property
    def load_error(self) -> BaseException | None:
        """Why its load failed, or was given up; None if it did not, or has not ended."""
        if not self._load.done():
            return None
        return asyncio.CancelledError() if self._load.cancelled() else self._load.exception()

    @property
    def state(self) -> State:
        """What is told of it."""
        if self._load.done() and not self.engine.dead:
            return "ready"
        if self._load.done():
            return "restarting" if self.restarts.by_itself else "failed"
        return "restarting" if self.restarts.down else "loading"

    async def wait(self, waiter: Waiter) -> None:
        """Wait until the model is loaded; leaving is by asyncio's cancellation, and the last one to leave ends the load.

        Raises:
            Refused: why the load failed, or that too many wait for it.
            Abandoned: the load had been given up before this one came to wait.
        """
        if not self._load.done():
            await self._waiters.stand_by(waiter, self._load)
        self._load.result()

    async def request(
        self,
        key: Hashable,
        prompt: str | Sequence[ChatMessage],
        options: GenerationOptions,
        bounds: Reading | None = None,
        owner: Hashable = None,
    ) -> GenerationRequest:
        """Make a prompt's token ids, in a thread because a long text takes long, and join them with the defaults.

        Owners take turns. `bounds` learns how many tokens were made, also where that was for nothing.

        Raises:
            Refused: why this model cannot serve the request.
        """
        loaded = self._loaded
        if loaded is None:
            raise Refused(*STOPPED)  # its engine died a moment ago
        bounds = bounds or Reading(loaded.context_length, "prompt")
        bounds.fit(loaded.context_length)
        encode = self._handler.encode_prompt if isinstance(prompt, str) else self._handler.encode_chat
        work = partial(cast("Callable[..., list[int]]", encode), loaded, prompt)
        try:
            ids = await self._texts.run(partial(bounds.read, work), owner)
        finally:
            bounds.end(len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt))
        return self._handler.request(loaded, key, ids, options)

    def describe(self) -> Description:
        """Give what a client is told of the model it will use."""
        return self._description

    def status(self) -> dict[str, object]:
        """Give this model's entry in the status of the server."""
        loading = not self._load.done() and self._stage is not None
        return {
            **self.describe(),
            "state": self.state,
            **({"stage": self._stage, "progress": self._progress} if loading else {}),
            **(_memory_and_notes(self._loaded.runner) if self._loaded else {"memory_bytes": 0}),
            "active": self.engine.active,
            "queued": self.engine.queued + self._waiters.in_line,
            "capacity": self.engine.capacity,
            "tokens_per_s": round(self.engine.tokens_per_s, 1),
            "steps": self.engine.steps,
            **({"restarts": self.restarts.count} if self.restarts.count else {}),
        }

    async def close(self) -> None:
        """End the load, or the engine with everything in it; nothing of the model is held any more.

        As long as the engine's thread hangs in a step, this waits.
        """
        self._load.cancel()
        await self.engine.close(patience=None)
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
        if back_off := self.restarts.back_off(self._clock.now()):
            await self._clock.pass_by(back_off)
        self._stage = "config"
        began = time.monotonic()
        load = partial(self._handler.load, self._folder, self.spec.options, progress)
        try:
            self._loaded = await self._start(load)
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
        self._description = _describe(self.spec, loaded)
        self.restarts.loaded(self._clock.now())
        how = (loaded.dtype, self.spec.options.quantization, loaded.device)
        log.info("loaded %s as %s, quantization %s, on %s in %.1f s", self.spec.model, *how, took)

    async def _start(self, load: Callable[[], LoadedModel]) -> LoadedModel:
        try:
            async with asyncio.timeout(self._load_timeout) as limit:
                return await self.engine.start(load, on_death=partial(self._on_change, self))
        except TimeoutError as error:
            if not limit.expired():
                raise
            self.engine.give_up_load()
            raise Refused("load_failed", TOO_LONG.format(self._load_timeout)) from error

    def _load_ended(self, load: asyncio.Task[None]) -> None:
        # Also when nobody waits any more to hear of it.
        self._on_change(self)

    def _tell_progress(self, stage: str, done: float) -> None:
        self._stage, self._progress = stage, done
        self._waiters.tell_progress(stage, done)


def _describe(spec: ModelSpec, loaded: LoadedModel | None = None) -> Description:
    return {
        "id": spec.model,
        "context_length": loaded.context_length if loaded else 0,
        "dtype": loaded.dtype if loaded else spec.options.dtype,
        "quantization": spec.options.quantization,
        "device": loaded.device if loaded else spec.options.device,
    }


def _memory_and_notes(runner: Runner) -> dict[str, object]:
    kv_cache = {"tokens": runner.block_count * runner.block_size, "bytes": runner.kv_bytes}
    return {
        "memory_bytes": runner.memory_bytes,
        **({"kv_cache": kv_cache} if runner.kv_bytes else {}),
        **({"notes": runner.notes} if runner.notes else {}),
    }
