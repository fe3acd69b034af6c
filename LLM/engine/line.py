"""A line of those who wait, fair between owners: they take turns, and what one owner has in line is served as it came.

Where every request counts the same, start-time fair queueing (Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM
1996) comes to this: its tags only say whose turn it is, so a ring of owners does for them, and an owner with nothing in line
needs no memory. Pure: it knows neither requests nor times.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Line(Generic[T]):
    """Those who wait, each under an owner. Iterates in the order in which they will be served, as things stand."""

    def __init__(self) -> None:
        # The owner whose turn it is comes first. Each has somebody in line.
        self._owners: OrderedDict[Hashable, dict[T, None]] = OrderedDict()
        self._owner_of: dict[T, Hashable] = {}
        self._put_back: deque[T] = deque()
        self._told: dict[T, int] = {}
        self._moved = False

    def __len__(self) -> int:
        return len(self._put_back) + len(self._owner_of)

    def __contains__(self, one: T) -> bool:
        return one in self._owner_of or one in self._put_back

    def __iter__(self) -> Iterator[T]:
        yield from self._put_back
        turns = [iter(theirs) for theirs in self._owners.values()]
        while turns:
            left = []
            for theirs in turns:
                for one in theirs:
                    yield one
                    left.append(theirs)
                    break
            turns = left

    @property
    def last(self) -> T | None:
        """Who will be served last of those who joined; none of those who were put back."""
        if not self._owners:
            return None
        longest = max(map(len, self._owners.values()))
        *_, theirs = (theirs for theirs in self._owners.values() if len(theirs) == longest)
        return next(reversed(theirs))

    def join(self, one: T, owner: Hashable) -> None:
        """Take one in, behind the owner's others; an owner who had nobody in line comes after all who have."""
        self._owners.setdefault(owner, {})[one] = None
        self._owner_of[one] = owner
        self._moved = True

    def put_back(self, one: T) -> None:
        """Take one in again who had been served, at the very head; it costs its owner no second turn."""
        self._put_back.appendleft(one)
        self._moved = True

    def leave(self, one: T) -> bool:
        """Take one out, wherever it stands; False if it is not in line."""
        if one in self._put_back:
            self._put_back.remove(one)
        elif one in self._owner_of:
            self._take_out(one)
        else:
            return False
        self._moved = True
        return True

    def serve(self) -> T:
        """Take out who is next, and pass the turn on."""
        self._moved = True
        if self._put_back:
            return self._put_back.popleft()
        one = next(iter(self))
        owner = self._take_out(one)
        if owner in self._owners:
            self._owners.move_to_end(owner)
        return one

    def moved(self) -> list[tuple[T, int]]:
        """Give everybody whose position is not what it was when this was last asked; 1 is next."""
        if not self._moved:
            return []
        told, self._moved = self._told, False
        self._told = {one: position for position, one in enumerate(self, 1)}
        return [(one, position) for one, position in self._told.items() if told.get(one) != position]

    def _take_out(self, one: T) -> Hashable:
        owner = self._owner_of.pop(one)
        theirs = self._owners[owner]
        del theirs[one]
        if not theirs:
            del self._owners[owner]
        return owner
