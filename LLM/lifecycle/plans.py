"""What clients' words come to, "auto" for one: made once for all who ask, by one thread for each folder and a few in all."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from LLM._base_model_handler import Plan
from LLM.errors import Refused
from LLM.model import ModelSpec

KEPT = 5.0  # seconds that a plan is kept which led to no load
AT_ONCE = 4  # folders that are read at the same time; the others wait

HUNG = "reading the model's folder took longer than {:g} s; its operator can look at the disk, or raise --load-timeout"


class _Making:
    """One plan that is being made, or was."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Plan]
        self.waiting = 0
        self.begun = False

    @property
    def plan(self) -> Plan | None:
        done = self.task.done() and not self.task.cancelled() and self.task.exception() is None
        return self.task.result() if done else None


class Plans:
    """The plans by what was asked for. All who ask for the same wait for the same, and so keep their order."""

    def __init__(self, make: Callable[[ModelSpec], Awaitable[Plan]], timeout: float) -> None:
        self._make = make
        self._timeout = timeout
        self._made: dict[ModelSpec, _Making] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._folders: dict[str, asyncio.Lock] = {}
        self._hung: dict[str, asyncio.Future[Plan]] = {}

    def __len__(self) -> int:
        return len(self._made)

    @property
    def hung(self) -> list[str]:
        """The models whose folders are still being read though that took too long."""
        return list(self._hung)

    async def get(self, spec: ModelSpec) -> Plan:
        """Give the plan; it is not begun if all who wanted it have left before.

        Raises:
            Refused: why it cannot be made.
        """
        making = self._made.get(spec) or self._begin(spec)
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if not making.waiting and not making.begun:
                making.task.cancel()

    def forget(self, spec: ModelSpec) -> None:
        """Make the plan of these words again when they are heard next."""
        self._made.pop(spec, None)

    def forget_soon(self, spec: ModelSpec) -> None:
        """Forget a plan that led to no load, but not at once: a client may ask again and again."""
        if making := self._made.get(spec):
            asyncio.get_running_loop().call_later(KEPT, self._forget_if_same, spec, making)

    def _forget_if_same(self, spec: ModelSpec, making: _Making) -> None:
        if self._made.get(spec) is making:
            del self._made[spec]

    def forget_all_of(self, settled: ModelSpec) -> None:
        """Forget all words that mean this."""
        for asked, making in list(self._made.items()):
            if (plan := making.plan) and ModelSpec(asked.model, plan.options) == settled:
                del self._made[asked]

    def _begin(self, spec: ModelSpec) -> _Making:
        making = self._made[spec] = _Making()
        making.task = asyncio.create_task(self._run(spec, making))
        making.task.add_done_callback(partial(self._ended, spec, making))
        return making

    def _ended(self, spec: ModelSpec, making: _Making, _: object) -> None:
        # One that nobody waits for leads to no model, and would be kept for ever.
        if (making.plan is None or not making.waiting) and self._made.get(spec) is making:
            del self._made[spec]

    async def _run(self, spec: ModelSpec, making: _Making) -> Plan:
        async with self._folders.setdefault(spec.model, asyncio.Lock()):
            if spec.model in self._hung:
                raise Refused("load_failed", HUNG.format(self._timeout))
            async with self._slots:
                making.begun = True
                work = asyncio.ensure_future(self._make(spec))
                await asyncio.wait([work], timeout=self._timeout)
        if work.done():
            return work.result()
        # The thread is left behind, and no second one is sent after it.
        self._hung[spec.model] = work
        work.add_done_callback(partial(self._came_back, spec.model))
        raise Refused("load_failed", HUNG.format(self._timeout))

    def _came_back(self, model: str, work: "asyncio.Future[Plan]") -> None:
        del self._hung[model]
        if not work.cancelled():
            work.exception()  # too late for anybody
