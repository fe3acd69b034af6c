"""Loads the models that clients ask for, keeps one engine per loaded model, and unloads what others need the room of.

Knows no clients. A client's string is only ever looked up in the listing made at start.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from LLM._base_model_handler import LoadOptions, Plan
from LLM.engine.thread import GenerationEngine, Turns
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.listing import MODELS_ROOT, list_models
from LLM.model import FAILED, Abandoned, Model, ModelSpec, Waiter
from LLM.room import leaving

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How long models stay loaded: what all on a device may take, in bytes, and the seconds that one nobody uses stays.

    None is 90 % of the device's memory, and as long as nothing else needs the room.
    """

    memory: int | None = None
    keep_alive: float | None = None


class ModelService:
    """The models of this server."""

    def __init__(
        self,
        default: str,
        options: LoadOptions,
        settings: EngineSettings,
        root: Path = MODELS_ROOT,
        keeping: Keeping = Keeping(),
    ) -> None:
        self.listing = list_models(root)
        self._options = options
        self._settings = settings
        self._keeping = keeping
        self._models: dict[ModelSpec, Model] = {}
        # What those who ask mean by their words, "auto" for one; known as long as the model is there. All who ask for the
        # same wait for the same, and so keep their order.
        self._plans: dict[ModelSpec, asyncio.Task[Plan]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._turns = Turns()
        self._default = default
        self.resolve()

    def resolve(
        self,
        model: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        quantization: str | None = None,
    ) -> ModelSpec:
        """Say which model a client means; None takes the server's default.

        Raises:
            Refused: `model_not_found`, naming those there are, or `unsupported`.
        """
        name = self._default if model is None else model
        if name not in self.listing:
            there = ", ".join(sorted(self.listing)) or "none"
            raise Refused("model_not_found", f"this server has no such model; it has: {there}", "model")
        if problem := self.listing[name].problem:
            raise Refused("load_failed", problem, "model")
        default = self._options
        options = replace(
            default,
            dtype=dtype or default.dtype,
            device=device or default.device,
            quantization=quantization or default.quantization,
        )
        return ModelSpec(self.listing[name].id, options)

    @asynccontextmanager
    async def use(self, spec: ModelSpec, waiter: Waiter) -> AsyncIterator[Model]:
        """Give the loaded model, after loading it if need be, and keep it loaded while the context lasts.

        Those who want the same model share one load. Models that nobody uses make room for it.

        Raises:
            Refused: why it cannot be loaded.
        """
        while True:
            model = await self._find(spec)
            with self._using(model):
                try:
                    await model.wait(waiter)
                except Abandoned:
                    continue  # it ended for those who had left, not for this one
                yield model
                return

    async def get(self, spec: ModelSpec, waiter: Waiter) -> Model:
        """Give the loaded model like `use`, but keep it no longer than others need it or have no need of its room."""
        async with self.use(spec, waiter) as model:
            return model

    def status(self) -> list[dict[str, object]]:
        """Give the status entries of all models that are loaded or being loaded, or whose engine died."""
        return [model.status() for model in self._models.values()]

    async def close(self) -> None:
        """End every load and every engine."""
        for model in list(self._models.values()):
            self._unload(model)
        if self._leaving:
            await asyncio.wait(self._leaving)

    async def _find(self, spec: ModelSpec) -> Model:
        """Give the model that is loaded or being loaded; begin to load it if it is neither."""
        if spec not in self._plans:
            self._plans[spec] = asyncio.create_task(self._plan(spec))
            self._plans[spec].add_done_callback(partial(self._planned, spec))
        plan = await asyncio.shield(self._plans[spec])
        try:
            return self._model(ModelSpec(spec.model, plan.options), plan)
        except Refused:
            self._plans.pop(spec, None)
            raise

    def _model(self, spec: ModelSpec, plan: Plan) -> Model:
        model = self._models.get(spec)
        if model and not model.failed:
            return model
        if model:
            self._unload(model)
        for idle in leaving(plan, self._models.values(), self._keeping.memory):
            log.info("unloading %s, to make room for %s", idle.name, spec.model)
            self._unload(idle)
        listed, engine = self.listing[spec.model], GenerationEngine(self._settings, self._turns)
        # What leaves now is counted as gone already: it has to be, before the load begins.
        after = tuple(self._leaving)
        model = Model(spec, listed.handler(), listed.folder, engine, plan.memory_bytes, self._forget, after)
        self._models[spec] = model
        return model

    async def _plan(self, spec: ModelSpec) -> Plan:
        listed = self.listing[spec.model]
        try:
            # In a thread: it reads files, and the first one imports torch.
            return await asyncio.to_thread(listed.handler().plan, listed.folder, spec.options)
        except Refused as error:
            log.error("cannot load %s: %s", spec.model, error.message, exc_info=error.__cause__)
            raise
        except Exception as error:
            log.exception("the folder of %s cannot be read", spec.model)
            raise Refused("load_failed", FAILED) from error

    def _planned(self, spec: ModelSpec, plan: "asyncio.Task[Plan]") -> None:
        if _failed(plan):
            self._plans.pop(spec, None)

    @contextmanager
    def _using(self, model: Model) -> Iterator[None]:
        model.users += 1
        model.left_at = None
        if model.expiry:
            model.expiry.cancel()
        try:
            yield
        finally:
            model.users -= 1
            if not model.users:
                self._left(model)

    def _left(self, model: Model) -> None:
        model.left_at = time.monotonic()
        if self._keeping.keep_alive is not None and self._models.get(model.spec) is model:
            model.expiry = asyncio.get_running_loop().call_later(self._keeping.keep_alive, self._expire, model)

    def _expire(self, model: Model) -> None:
        log.info("unloading %s: nobody has used it for %g s", model.name, self._keeping.keep_alive)
        self._unload(model)

    def _unload(self, model: Model) -> None:
        self._forget(model)
        task = asyncio.create_task(model.close())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _forget(self, model: Model) -> None:
        # A load that failed is no model either; what clients may name must not fill the server's memory.
        if self._models.get(model.spec) is not model:
            return
        del self._models[model.spec]
        if model.expiry:
            model.expiry.cancel()
        for asked, plan in list(self._plans.items()):
            if plan.done() and not _failed(plan) and ModelSpec(asked.model, plan.result().options) == model.spec:
                del self._plans[asked]


def _failed(plan: "asyncio.Task[Plan]") -> bool:
    return plan.cancelled() or plan.exception() is not None
