"""A store that several owners share: what each takes of it, and what is to be forgotten first when all take too much.

Pure: it holds sizes and ranks, and knows neither answers nor connections.
"""

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

# A rank of 0 is forgotten before one of 1, and that before one of 2; inside a rank the one that came to it first.
RANKS = 3


class _Share(Generic[T]):
    """What one owner has."""

    def __init__(self) -> None:
        self.size = 0
        self.count = 0
        self.ranks: tuple[OrderedDict[T, None], ...] = tuple(OrderedDict() for _ in range(RANKS))

    @property
    def first(self) -> T | None:
        return next((thing for rank in self.ranks for thing in rank), None)


@dataclass(slots=True)
class _Thing:
    owner: Hashable
    size: int
    rank: int | None


class Shares(Generic[T]):
    """Things by their owners. Every call takes O(log n)."""

    def __init__(self) -> None:
        self.size = 0
        self._things: dict[T, _Thing] = {}
        self._shares: dict[Hashable, _Share[T]] = {}
        # The owners of whom something can be forgotten, the largest first. An entry whose size is not the owner's is old.
        self._largest: list[tuple[int, int, Hashable]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._things)

    def __contains__(self, thing: T) -> bool:
        return thing in self._things

    def add(self, thing: T, owner: Hashable, size: int, rank: int | None) -> None:
        """Take a thing in; without a rank it cannot be forgotten now."""
        share = self._shares.setdefault(owner, _Share())
        share.count += 1
        self._things[thing] = _Thing(owner, 0, None)
        self.grow(thing, size)
        self.move(thing, rank)

    def grow(self, thing: T, by: int) -> None:
        """Count what a thing takes more, or less."""
        entry = self._things[thing]
        entry.size += by
        self._shares[entry.owner].size += by
        self.size += by
        self._note(entry.owner)

    def move(self, thing: T, rank: int | None) -> None:
        """Give a thing another rank."""
        entry = self._things[thing]
        if rank == entry.rank:
            return
        ranks = self._shares[entry.owner].ranks
        if entry.rank is not None:
            del ranks[entry.rank][thing]
        if rank is not None:
            ranks[rank][thing] = None
        entry.rank = rank
        self._note(entry.owner)

    def remove(self, thing: T) -> None:
        """Take a thing out."""
        entry = self._things[thing]
        self.move(thing, None)
        self.grow(thing, -entry.size)
        del self._things[thing]
        share = self._shares[entry.owner]
        share.count -= 1
        if not share.count:
            del self._shares[entry.owner]

    def first(self, most: int) -> T | None:
        """Give what is to be forgotten first where all may take `most`; None if nothing can be.

        It is one of the owner's who has the largest share. One with an equal share or less loses nothing.
        """
        while self._largest:
            size, _, owner = self._largest[0]
            share = self._shares.get(owner)
            if share and share.size == -size and (first := share.first) is not None:
                return first if share.size * len(self._shares) > most else None
            heapq.heappop(self._largest)
        return None

    def _note(self, owner: Hashable) -> None:
        """Keep the owner's size where the largest is looked for."""
        share = self._shares[owner]
        if share.first is None:
            return  # until something of it has a rank
        self._serial += 1
        heapq.heappush(self._largest, (-share.size, self._serial, owner))
        if len(self._largest) > 4 * len(self._shares) + 64:
            there = enumerate(self._shares.items())
            self._largest = [(-other.size, number, name) for number, (name, other) in there if other.first is not None]
            heapq.heapify(self._largest)
            self._serial = len(self._largest) + len(self._shares)
