"""Who uses one model, and what one client may hold of all. Owners are whatever the caller tells clients apart by."""

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from LLM.errors import Refused

# Seconds in which a model that another client has used leaves only after all others.
RECENT = 30.0


class Tenants:
    """The owners that use one model, after the one that had it loaded. None is the server itself."""

    def __init__(self, begun_by: Hashable = None, pinned: bool = False) -> None:
        self.pinned = pinned  # whether it stays when others need its room
        self._using: Counter[Hashable] = Counter()
        self._last: Hashable = begun_by

    def __len__(self) -> int:
        return self._using.total()

    def enter(self, owner: Hashable) -> None:
        """Count a use."""
        self._using[owner] += 1

    def leave(self, owner: Hashable) -> None:
        """Count the end of a use."""
        self._using[owner] -= 1
        if not self._using[owner]:
            del self._using[owner]
        self._last = owner

    def is_only(self, owner: Hashable) -> bool:
        """Whether only `owner` uses it or, where it is idle, has used it last."""
        return set(self._using) == {owner} if self._using else self._last == owner


class Tenanted(Protocol):
    """A model that is loaded or being loaded."""

    tenants: Tenants

    @property
    def name(self) -> str:
        """Its id."""
        ...

    @property
    def left_at(self) -> float | None:
        """When its last user left it; None while it cannot leave."""
        ...


M = TypeVar("M", bound=Tenanted)


def leaving_for(owner: Hashable, models: Iterable[M], most: int) -> list[M]:
    """Give those of a client's own models that leave before it has another one loaded, the least recently used first.

    Raises:
        Refused: `overloaded`, if it uses as many as one client may.
    """
    if owner is None:
        return []
    own = [model for model in models if not model.tenants.pinned and model.tenants.is_only(owner)]
    idle = sorted((model for model in own if model.left_at is not None), key=lambda model: model.left_at or 0.0)
    too_many = max(len(own) - most + 1, 0)
    if too_many > len(idle):
        names = ", ".join(sorted({model.name for model in own}))
        why = f"one client may use {most} models that are loaded for it alone, and this one uses: {names}"
        raise Refused("overloaded", f"{why}; use one of them, or wait until what runs there has ended")
    return idle[:too_many]


def recent_of_others(owner: Hashable, models: Iterable[M]) -> Sequence[M]:
    """Give the models that other clients have used a moment ago."""
    since = time.monotonic() - RECENT
    others = (model for model in models if owner is not None and not model.tenants.is_only(owner))
    return [model for model in others if model.left_at is not None and model.left_at > since]
