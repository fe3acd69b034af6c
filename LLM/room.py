"""Which models have to leave so that another one fits: the memory budget of a device. Pure: it unloads nothing."""

from collections.abc import Collection, Iterable
from typing import Protocol, TypeVar

from LLM._base_model_handler import Plan
from LLM.errors import Refused

# Each has a thread, and one model loaded in two ways is two: what clients may ask for must have an end.
MOST_MODELS = 8
SHARE = 0.9  # of a device's memory, where the operator did not say
GIB = 1 << 30


class Resident(Protocol):
    """A model that is loaded or being loaded."""

    @property
    def name(self) -> str:
        """Its id."""
        ...

    @property
    def device(self) -> str:
        """Where it is."""
        ...

    @property
    def memory_bytes(self) -> int:
        """What it takes there."""
        ...

    @property
    def pinned(self) -> bool:
        """Whether it is to stay also when nobody uses it."""
        ...

    @property
    def left_at(self) -> float | None:
        """When its last user left it, by any clock; None while somebody uses it, or it is to stay."""
        ...


R = TypeVar("R", bound=Resident)


def leaving(
    plan: Plan, residents: Iterable[R], memory: int | None, most: int = MOST_MODELS, last: Collection[R] = ()
) -> list[R]:
    """Give those who must leave before what is planned fits, the least recently used first; nobody in use is among them.

    `memory` is what all models of a device may take, in bytes; None is 90 % of what the device has. `most` is how many
    models may be loaded. Those that are in `last` leave after the others.

    Raises:
        Refused: `load_failed` if it would not fit even alone, `overloaded` if those in use are in the way.
    """
    device, need = plan.options.device, plan.memory_bytes
    budget = int(plan.device_bytes * SHARE) if memory is None else memory
    if need > budget:
        raise Refused(
            "load_failed",
            f"the model takes {_in_words(need)} with its KV cache, and models may take {_in_words(budget)} on {device}; "
            "choose a smaller dtype, or let the operator raise --memory or lower --kv-memory",
        )
    residents = list(residents)
    # What takes nothing, as the echo model does, fits even where its handler knows of no memory at all.
    free = budget - sum(r.memory_bytes for r in residents if _meet(r.device, device)) if need else 0
    places = most - len(residents)
    found: list[R] = []
    for resident in sorted((r for r in residents if r.left_at is not None), key=lambda r: (r in last, r.left_at)):
        # One elsewhere gives its place, but no memory.
        if (free < need and _meet(resident.device, device)) or places < 1:
            found.append(resident)
            free += resident.memory_bytes if _meet(resident.device, device) else 0
            places += 1
    if free < need or places < 1:
        users = ", ".join(sorted({r.name for r in residents if r.left_at is None}))
        kept = " or always kept loaded" if any(r.pinned for r in residents) else ""
        raise Refused(
            "overloaded",
            f"there is no room for the model while these are in use{kept}: {users}; use one of them, or try again later",
        )
    return found


def _meet(one: str, other: str) -> bool:
    """Say whether models on these devices take memory from each other; one on "cuda" is spread over all GPUs."""
    return one == other or ("cuda" in (one, other) and one.startswith("cuda") and other.startswith("cuda"))


def _in_words(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
