"""A line that is fair between owners by the tokens they were served, and inside an owner between its users.

Each owner has a counter of the tokens it was served, and the one with the smallest counter is next (Sheng et al., "Fairness
in Serving Large Language Models", OSDI 2024). An owner that comes back is lifted to just below the smallest counter of those
that are active, as Linux's CFS does for a task that slept: to have been idle is no claim. One that was never here begins at
that counter: many new ones at once do not go before all others. While others wait, an owner at its limit of running places
comes after those below theirs. Pure: it knows neither requests nor times.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

# Tokens: so far below the smallest counter begins who was idle. It makes a short request go first, and no more than that.
CREDIT = 64
# Tokens: the lead with which an owner that was idle gets a place at once, as CFS does for a task that wakes up.
WAKING = 16
# Idle owners whose counters are remembered; the one that has been idle for longest is forgotten first.
REMEMBERED = 1024


class _Share(Generic[T]):
    """What an owner was served, and what it has in line and running; or of all owners, or of one user.

    A share that has `parts` has nothing in line itself.
    """

    def __init__(self, parent: "_Share[T] | None", name: Hashable) -> None:
        self.parent = parent
        self.name = name
        self.served = 0
        self.running = self.waiting = self.new = 0  # `new` are those of the waiting that never ran
        self.turn = 0  # equal counters take turns
        self.woke = True  # whether nothing of it ran since it was idle
        self.parts: dict[Hashable, _Share[T]] = {}
        self.idle: OrderedDict[Hashable, int] = OrderedDict()  # the counters of parts with nothing waiting or running
        self.floor = 0  # the smallest counter of the active parts, which never falls
        self.back: list[tuple[T, int]] = []  # those that ran before, with their cost; the last of the list is next
        self.line: dict[T, tuple[int, int]] = {}  # each with its cost, and its number among all that ever joined

    def part(self, name: Hashable) -> "_Share[T]":
        """Return a part, which becomes active."""
        if name not in self.parts:
            self._lift_floor()
            part = self.parts[name] = _Share(self, name)
            part.served = max(self.idle.pop(name, self.floor), self.floor - CREDIT)
        return self.parts[name]

    def drop(self, part: "_Share[T]") -> None:
        """Let a part be idle, and remember its counter."""
        self._lift_floor()
        del self.parts[part.name]
        self.idle[part.name] = part.served
        if len(self.idle) > REMEMBERED:
            self.idle.popitem(last=False)

    def path(self) -> "list[_Share[T]]":
        """Return the shares from the owner's down to this one."""
        return [*self.parent.path(), self] if self.parent else []

    @property
    def newest(self) -> int:
        """The number of the one that joined last, of those that never ran."""
        if self.parts:
            return max(part.newest for part in self.parts.values())
        return self.line[next(reversed(self.line))][1] if self.line else 0

    def _lift_floor(self) -> None:
        self.floor = max(self.floor, min((part.served for part in self.parts.values()), default=0))


class FairQueue(Generic[T]):
    """Those that wait, each under an owner and a user, and those that run.

    Iterates in the order in which they will be served, as things stand. `limit` tells how many of one owner may run while
    others wait; of one user, that is half of what its owner runs.
    """

    def __init__(self, limit: Callable[[], float] = lambda: math.inf) -> None:
        self._limit = limit
        self._all: _Share[T] = _Share(None, None)
        self._share_of: dict[T, _Share[T]] = {}
        self._running: dict[T, int] = {}  # each with its cost
        self._told: dict[T, int] = {}
        self._moved = False
        self._joined = self._turns = 0
        self._told_until = 0  # of those that joined, how many were told their positions

    def __len__(self) -> int:
        return self._all.waiting

    def __contains__(self, one: T) -> bool:
        return one in self._share_of and one not in self._running

    def __iter__(self) -> Iterator[T]:
        return (one for one, _ in self._order(self._all))

    @property
    def next(self) -> T | None:
        """The one that is served next."""
        return next(iter(self), None)

    @property
    def last(self) -> T | None:
        """The newest of the owner that has most in line; none that ran before."""
        if not self._all.new:
            return None
        share = self._all
        while share.parts:
            share = max(share.parts.values(), key=lambda part: (part.new, part.newest))
        return next(reversed(share.line))

    def join(self, one: T, owner: Hashable, user: Hashable = None, cost: int = 1) -> None:
        """Add one behind its user's others; `cost` is about how many tokens it will be served."""
        share = self._share_of[one] = self._all.part(owner).part(user)
        self._joined += 1
        share.line[one] = cost, self._joined
        self._count(share, waiting=1, new=1)
        for part in share.path():
            part.turn = part.turn or self._next_turn()

    def serve(self) -> T:
        """Take out the one that is next: it runs from now on."""
        one, cost = next(self._order(self._all))
        share = self._share_of[one]
        if share.back:
            share.back.pop()
        else:
            del share.line[one]
            self._count(share, new=-1)
        self._running[one] = cost
        self._count(share, waiting=-1, running=1)
        for part in share.path():
            part.turn = self._next_turn()
            part.woke = False
        return one

    def put_back(self, one: T) -> None:
        """Let one that runs wait again, before its user's others."""
        share = self._share_of[one]
        cost = self._running.pop(one)
        share.back.append((one, cost))
        self._count(share, waiting=1, running=-1)

    def leave(self, one: T) -> bool:
        """Remove one that waits or runs; return whether it was here."""
        share = self._share_of.pop(one, None)
        if share is None:
            return False
        if self._running.pop(one, None) is not None:
            self._count(share, running=-1)
        elif one in share.line:
            del share.line[one]
            self._count(share, waiting=-1, new=-1)
        else:
            share.back = [(other, cost) for other, cost in share.back if other != one]
            self._count(share, waiting=-1)
        for part in reversed(share.path()):
            if part.parent and not part.waiting and not part.running:
                part.parent.drop(part)
        return True

    def charge(self, one: T, tokens: int) -> None:
        """Count tokens that one was served."""
        for part in self._share_of[one].path():
            part.served += tokens

    def served(self, one: T) -> tuple[int, ...]:
        """Return what its owner and its user were served: the smaller, the sooner it should go forward."""
        return tuple(part.served for part in self._share_of[one].path())

    def outranks(self, waiting: T, running: T, quantum: int) -> bool:
        """Whether one that waits should have the place of one that runs.

        It should where the other's owner runs more than its share and its own does not, or where its own runs nothing and
        was served less by `quantum` tokens, so that the two do not change places at each step. An owner that was idle
        needs a smaller lead, once: who asks now and then does not wait for those who ask without end.
        """
        for mine, theirs in zip(self._share_of[waiting].path(), self._share_of[running].path(), strict=True):
            if mine is theirs or mine.parent is None:
                continue
            limit = self._limit_of(mine.parent)
            over = theirs.running > limit and mine.running < limit
            lead = min(quantum, WAKING) if mine.woke else quantum
            return over or (not mine.running and mine.served + lead <= theirs.served)
        return False

    def moved(self, only_new: bool = False) -> list[tuple[T, int]]:
        """Return everyone whose position is not what was returned last, or of `only_new` ones; 1 is next."""
        if not (self._joined > self._told_until if only_new else self._moved):
            return []
        told, self._told_until = self._told, self._joined
        self._told = {one: position for position, one in enumerate(self, 1)}
        if only_new:
            self._told |= {one: position for one, position in told.items() if one in self._told}
        else:
            self._moved = False
        return [(one, position) for one, position in self._told.items() if told.get(one) != position]

    def _order(self, share: _Share[T]) -> Iterator[tuple[T, int]]:
        """Yield those in line as they will be served if each is served its cost, and each of these with that cost."""
        if not share.parts:
            yield from chain(reversed(share.back), ((one, cost) for one, (cost, _) in share.line.items()))
            return
        limit, turns = self._limit_of(share), self._turns
        heap = [
            (part.running >= limit, part.served, part.running, part.turn, part.running, self._order(part))
            for part in share.parts.values()
            if part.waiting
        ]
        heapq.heapify(heap)
        while heap:
            _, served, _, _, running, theirs = heap[0]
            if (one := next(theirs, None)) is None:
                heapq.heappop(heap)
                continue
            yield one
            turns, running, served = turns + 1, running + 1, served + one[1]
            heapq.heapreplace(heap, (running >= limit, served, running, turns, running, theirs))

    def _limit_of(self, share: _Share[T]) -> float:
        return self._limit() if share is self._all else max(1, share.running // 2)

    def _count(self, share: _Share[T], waiting: int = 0, running: int = 0, new: int = 0) -> None:
        self._moved = True
        for part in (self._all, *share.path()):
            part.waiting += waiting
            part.running += running
            part.new += new

    def _next_turn(self) -> int:
        self._turns += 1
        return self._turns
