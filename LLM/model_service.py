"""Loads the models that clients ask for, keeps one engine per loaded model, and unloads what others need the room of.

Knows no clients. A client's string is only ever looked up in the listing made at start.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from LLM._base_model_handler import LoadOptions, Plan
from LLM.blocking import BlockingCalls
from LLM.departures import Departures
from LLM.engine.clock import MONOTONIC, Clock
from LLM.engine.thread import PATIENCE, GenerationEngine
from LLM.engine.turns import Turns
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.lifecycle.plans import Plans
from LLM.lifecycle.tenants import Tenants, leaving_for, recent_of_others
from LLM.listing import MODELS_ROOT, list_models
from LLM.model import FAILED, PROBLEMS, Abandoned, Event, Model, ModelSpec, Waiter
from LLM.restarts import Restarts
from LLM.room import MOST_MODELS, leaving

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How long models stay loaded: what all on a device may take, in bytes, and the seconds that one nobody uses stays.

    None is 90 % of the device's memory, and as long as nothing else needs the room. The default model and those to `pin`
    leave for no other one, and those to `pin` stay also when nobody uses them.
    """

    memory: int | None = None
    keep_alive: float | None = None
    pin: tuple[str, ...] = ()
    models: int = MOST_MODELS
    models_per_client: int = 2
    load_timeout: float = 1800.0


class ModelService:
    """The models of this server."""

    def __init__(
        self,
        default: str,
        options: LoadOptions,
        settings: EngineSettings,
        root: Path = MODELS_ROOT,
        keeping: Keeping = Keeping(),
        clock: Clock = MONOTONIC,
    ) -> None:
        self.listing = list_models(root)
        # Whether `close` had to leave a thread behind, for which the interpreter would wait at its exit.
        self.stuck = False
        self.on_event: Callable[[Event, str], None] = lambda event, model: None
        self._options = options
        self._settings = settings
        self._keeping = keeping
        self._models: dict[ModelSpec, Model] = {}
        # What those who ask mean by their words; known as long as the model is there.
        self._plans = Plans(self._plan, keeping.load_timeout)
        self._logged: dict[str, str] = {}  # why a model could not be planned with, as the log says it already
        self._leaving = Departures()
        self._restarts: dict[ModelSpec, Restarts] = {}
        self._restarting: set[asyncio.Task[None]] = set()
        self._clock = clock
        self._turns = Turns()
        patience = settings.step_timeout
        self._folders = BlockingCalls("reading a model's folder", 4, settings.max_queue, patience, clock)
        # Those in an engine's line have come through here; as many more may be on their way to it.
        self._texts = BlockingCalls("reading a prompt", 2, 2 * settings.max_queue, patience, clock)
        self._default = default
        self._default_spec = self._default_asked = self.resolve()
        self._default_missing: str | None = "is not loaded yet"
        # What the words for the pinned models mean, as far as that is known.
        self._pinned = {spec: spec for spec in [self._default_spec, *map(self.resolve, keeping.pin)]}

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
            model = await self._find(spec, waiter)
            with self._using(model, waiter.owner):
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

    @property
    def problem(self) -> str | None:
        """What keeps this server from serving its default model, in a line; None if it can, if need be after loading it."""
        model = self._models.get(self._default_spec)
        problem = PROBLEMS[model.state] if model else self._default_missing
        if hangs := self._folders.problem or self._texts.problem:
            return hangs
        # Without names: /readyz shows this to clients that have no key.
        if problem:
            return f"the default model {problem}"
        if self._plans.hung:
            return "reading a model's folder hangs"
        return "loading a model hangs" if any(model.load_error for model in self._leaving.stuck) else None

    async def close(self) -> None:
        """End every load and every engine; a thread that does not end in time is left behind."""
        for task in self._restarting:
            task.cancel()
        if self._restarting:
            await asyncio.wait(self._restarting)
        models = [*self._models.values(), *self._leaving.stuck]
        for model in list(self._models.values()):
            self._unload(model)
        await self._leaving.over(PATIENCE)
        await asyncio.gather(self._folders.close(), self._texts.close())
        left = self._folders.busy or self._texts.busy
        self.stuck = left or bool(self._leaving) or any(model.engine.has_thread for model in models)

    async def _find(self, spec: ModelSpec, waiter: Waiter) -> Model:
        """Give the model that is loaded or being loaded; begin to load it if it is neither."""
        # Reading a folder is slow, so a forbidden load is refused first. If the model is loaded in some precision, only the
        # plan tells whether it is the one asked for.
        if waiter.permission and all(model.name != spec.model for model in self._models.values()):
            waiter.permission.check()
        plan = await self._plans.get(spec)
        settled = ModelSpec(spec.model, plan.options)
        if spec == self._default_asked:
            self._default_spec = settled
        if spec in self._pinned:
            self._pinned[spec] = settled
        model = self._models.get(settled)
        if model and not model.failed:
            return model
        try:
            return self._load(settled, plan, waiter, model)
        except Refused:
            self._plans.forget_soon(spec)
            raise

    def _load(self, spec: ModelSpec, plan: Plan, waiter: Waiter, dead: Model | None) -> Model:
        for idle in self._leaving_for(plan, waiter, dead):
            log.info("unloading %s, to make room for %s", idle.name, spec.model)
            self._unload(idle)
        if dead:
            self._unload(dead)
        model = self._models[spec] = self._begin_to_load(spec, plan, waiter.owner)
        self.on_event("loading", spec.model)
        return model

    def _leaving_for(self, plan: Plan, waiter: Waiter, dead: Model | None) -> list[Model]:
        """Give those that must leave before the load that is planned begins, if it may begin at all."""
        # Where a thread hangs the memory is not free, also if the model that takes its place is the same.
        stuck = self._leaving.stuck
        others = [other for other in self._models.values() if other is not dead and other not in stuck]
        own = leaving_for(waiter.owner, others, self._keeping.models_per_client)
        stay = [other for other in [*others, *stuck] if other not in own]
        recent = recent_of_others(waiter.owner, stay)
        found = [*own, *leaving(plan, stay, self._keeping.memory, self._keeping.models, recent)]
        if waiter.permission:
            waiter.permission.spend()
        return found

    def _begin_to_load(self, spec: ModelSpec, plan: Plan, owner: Hashable) -> Model:
        now = self._clock.now()
        self._restarts = {s: r for s, r in self._restarts.items() if s in self._models or not r.forgotten(now)}
        restarts = self._restarts.setdefault(spec, Restarts())
        listed, engine = self.listing[spec.model], GenerationEngine(self._settings, self._turns, self._clock)
        return Model(
            spec,
            listed.handler(),
            listed.folder,
            engine,
            plan.memory_bytes,
            on_change=self._changed,
            restarts=restarts,
            clock=self._clock,
            texts=self._texts,
            tenants=Tenants(owner, spec in self._pinned.values()),
            load_timeout=self._keeping.load_timeout,
            # What leaves now is counted as gone already: it has to be, before the load begins.
            after=self._leaving.leaving,
        )

    def _changed(self, model: Model) -> None:
        """Hear that a model's load has ended, or that its engine died."""
        there = self._models.get(model.spec) is model
        if model.load_error:
            # A load that failed is no model; what clients may name must not fill the server's memory.
            if there and not isinstance(model.load_error, Abandoned):
                self._missing(model, "failed to load")
            self._forget(model)
            if model.engine.stuck:
                self._leaving.let_go(model)
            self.on_event("load_failed" if isinstance(model.load_error, Refused) else "unloaded", model.name)
        elif model.failed:
            self._leaving.let_go(model)
            if there:
                self._died(model)
        elif there:
            self._missing(model, None)
            self.on_event("ready", model.name)

    def _missing(self, model: Model, why: str | None) -> None:
        if model.spec == self._default_spec:
            self._default_missing = why

    def _died(self, model: Model) -> None:
        now = self._clock.now()
        model.restarts.died(now)
        self.on_event("died", model.name)
        log.error("the engine of %s died; it can be loaded anew in %g s", model.name, model.restarts.back_off(now))
        if model.restarts.by_itself:
            task = asyncio.create_task(self._restart(model))
            self._restarting.add(task)
            task.add_done_callback(self._restarting.discard)

    async def _restart(self, model: Model) -> None:
        try:
            await self._plans.get(model.spec)
            # Or somebody who asked was quicker, or it was unloaded because nobody did.
            if self._models.get(model.spec) is model:
                await self.get(model.spec, Waiter())
            else:
                self._plans.forget(model.spec)
        except Refused as refused:
            log.error("cannot load %s anew: %s", model.name, refused.message)
        finally:
            model.restarts.gave_up()

    async def _plan(self, spec: ModelSpec) -> Plan:
        listed = self.listing[spec.model]
        try:
            # In a thread: it reads files, and the first one imports torch.
            make = partial(listed.handler().plan, listed.folder, spec.options)
            plan: Plan = await self._folders.run(make, owner=listed.folder)
            self._logged.pop(spec.model, None)
            return plan
        except Refused as error:
            # Clients may ask for the same again and again.
            level = logging.DEBUG if self._logged.get(spec.model) == error.message else logging.ERROR
            log.log(level, "cannot load %s: %s", spec.model, error.message, exc_info=error.__cause__)
            self._logged[spec.model] = error.message
            self.on_event("load_failed", spec.model)
            raise
        except Exception as error:
            log.exception("the folder of %s cannot be read", spec.model)
            self.on_event("load_failed", spec.model)
            raise Refused("load_failed", FAILED) from error

    @contextmanager
    def _using(self, model: Model, owner: Hashable) -> Iterator[None]:
        model.tenants.enter(owner)
        model.unused_since = None
        if model.expiry:
            model.expiry.cancel()
        try:
            yield
        finally:
            model.tenants.leave(owner)
            if not model.tenants:
                self._left(model)

    def _left(self, model: Model) -> None:
        model.unused_since = time.monotonic()
        stays = model.tenants.pinned and model.spec != self._default_spec
        if self._keeping.keep_alive is not None and not stays and self._models.get(model.spec) is model:
            model.expiry = asyncio.get_running_loop().call_later(self._keeping.keep_alive, self._expire, model)

    def _expire(self, model: Model) -> None:
        log.info("unloading %s: nobody has used it for %g s", model.name, self._keeping.keep_alive)
        self._unload(model)

    def _unload(self, model: Model) -> None:
        self._forget(model)
        self._leaving.let_go(model)
        self.on_event("unloaded", model.name)

    def _forget(self, model: Model) -> None:
        if self._models.get(model.spec) is not model:
            return
        del self._models[model.spec]
        if model.expiry:
            model.expiry.cancel()
        self._plans.forget_all_of(model.spec)
