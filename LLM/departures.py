"""Models on their way out. What one takes is free once its thread has ended; one whose thread hangs may never end."""

import asyncio
from collections.abc import Collection

from LLM.model import Model


class Departures:
    """Those that were let go, until nothing of them is left."""

    def __init__(self) -> None:
        self._leaving: dict[Model, asyncio.Task[None]] = {}
        self._stuck: dict[Model, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._leaving) + len(self._stuck)

    @property
    def leaving(self) -> Collection[asyncio.Task[None]]:
        """The ends that are worth waiting for."""
        return tuple(self._leaving.values())

    @property
    def stuck(self) -> Collection[Model]:
        """Those that hang, and hold what they take."""
        return tuple(self._stuck)

    def let_go(self, model: Model) -> None:
        """End a model's engine and give its memory back; to be called again when its thread turns out to hang."""
        if model in self._stuck:
            return
        if task := self._leaving.get(model):
            if not model.engine.stuck:
                return
            task.cancel()  # so that nobody waits for it any more
        tasks = self._stuck if model.engine.stuck else self._leaving
        tasks[model] = asyncio.create_task(model.close())
        tasks[model].add_done_callback(lambda _: tasks.pop(model, None))

    async def over(self, patience: float) -> None:
        """Wait until all have gone, for so many seconds at most; those that are left then are left behind."""
        if self._leaving:
            await asyncio.wait(self._leaving.values(), timeout=patience)
        for model in [*self._leaving, *self._stuck]:
            model.engine.leave_behind()
