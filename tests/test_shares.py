"""The store that owners share, against a plain model of it that looks at everything each time."""

import heapq

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wsserver.sessions.shares import RANKS, Shares

MOST = 20
RANK = st.sampled_from([None, *range(RANKS)])


class Store(RuleBasedStateMachine):
    """Any calls; what is to be forgotten first is what the rules of the store say, read off all things there are."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares[int]()
        self.things: dict[int, tuple[str, int, int | None, int]] = {}  # owner, size, rank, since when it has that rank
        self.count = 0

    @rule(owner=st.sampled_from("abcd"), size=st.integers(0, 9), rank=RANK)
    def add(self, owner: str, size: int, rank: int | None) -> None:
        self.count += 1
        self.things[self.count] = owner, size, rank, self.count
        self.shares.add(self.count, owner, size, rank)

    @rule(data=st.data(), by=st.integers(0, 5))
    def grow(self, data: st.DataObject, by: int) -> None:
        if self.things:
            thing = data.draw(st.sampled_from(sorted(self.things)))
            owner, size, rank, since = self.things[thing]
            self.things[thing] = owner, size + by, rank, since
            self.shares.grow(thing, by)

    @rule(data=st.data(), rank=RANK)
    def move(self, data: st.DataObject, rank: int | None) -> None:
        if self.things:
            thing = data.draw(st.sampled_from(sorted(self.things)))
            owner, size, old, since = self.things[thing]
            self.count += 1
            self.things[thing] = owner, size, rank, since if rank == old else self.count
            self.shares.move(thing, rank)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.things:
            thing = data.draw(st.sampled_from(sorted(self.things)))
            del self.things[thing]
            self.shares.remove(thing)

    @rule()
    def make_room(self) -> None:
        while self.shares.size > MOST and (first := self.shares.first(MOST)) is not None:
            assert first in self.allowed()
            del self.things[first]
            self.shares.remove(first)

    def sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for owner, size, *_ in self.things.values():
            sizes[owner] = sizes.get(owner, 0) + size
        return sizes

    def allowed(self) -> list[int]:
        """Give what may be forgotten first: the owners with the largest share may be several."""
        sizes = self.sizes()
        candidates = {owner: [] for owner in sizes}
        for thing, (owner, _, rank, since) in self.things.items():
            if rank is not None:
                candidates[owner].append((rank, since, thing))
        largest = max((sizes[owner] for owner, found in candidates.items() if found), default=0)
        if largest * len(sizes) <= MOST:
            return []
        return [min(found)[2] for owner, found in candidates.items() if found and sizes[owner] == largest]

    @invariant()
    def what_goes_first_is_what_the_rules_say(self) -> None:
        allowed = self.allowed()
        first = self.shares.first(MOST)
        assert first in allowed if allowed else first is None
        assert self.shares.size == sum(self.sizes().values())
        assert len(self.shares) == len(self.things)
        assert len(self.shares._shares) == len(self.sizes())


Store.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)
TestStore = Store.TestCase


def test_what_is_looked_at_does_not_grow_with_what_there_is(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    looked, pop = 0, heapq.heappop

    def counted(heap: list[tuple[int, int, object]]) -> object:
        nonlocal looked
        looked += 1
        return pop(heap)

    monkeypatch.setattr("wsserver.sessions.shares.heapq.heappop", counted)
    shares = Shares[int]()
    for number in range(10_000):
        shares.add(number, number % 3_000, 4096, 0)
        if shares.size > 1 << 20 and (first := shares.first(1 << 20)) is not None:
            shares.remove(first)
    assert looked < 10 * 10_000
    assert len(shares._largest) <= 4 * len(shares._shares) + 64
