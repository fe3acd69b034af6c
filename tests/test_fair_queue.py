"""The line of those who wait: fair between owners by what they were served, and true positions."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from LLM.engine.scheduling.fair_queue import CREDIT, REMEMBERED, WAKING, FairQueue

OWNERS = "abcd"


def queue_of(*names: str, limit: float = 99) -> FairQueue[str]:
    """A line of those named, each by its owner's letter and a number."""
    queue: FairQueue[str] = FairQueue(lambda: limit)
    for name in names:
        queue.join(name, name[0])
    return queue


def served(queue: FairQueue[str], count: int | None = None, tokens: int = 1) -> list[str]:
    """Serve so many, each for so many tokens, one after the other."""
    order = []
    for _ in range(len(queue) if count is None else count):
        order.append(queue.serve())
        queue.charge(order[-1], tokens)
        queue.leave(order[-1])
    return order


def test_what_one_owner_has_in_line_is_served_as_it_came() -> None:
    names = [f"a{number}" for number in range(50)]
    assert served(queue_of(*names)) == names


def test_equal_owners_take_turns_also_with_one_who_comes_in_the_middle() -> None:
    queue = queue_of("a0", "a1", "a2", "a3", "b0", "b1", "b2")
    assert served(queue, 3) == ["a0", "b0", "a1"]
    queue.join("c0", "c")
    queue.join("c1", "c")
    assert list(queue) == served(queue)


def test_who_was_served_many_tokens_waits_for_those_who_were_served_few() -> None:
    queue = queue_of("a0", "a1", "b0", "b1", "b2", "b3")
    running = queue.serve()
    queue.charge(running, 1000)
    assert (running, list(queue)) == ("a0", ["b0", "b1", "b2", "b3", "a1"])
    queue.charge(running, 10**6)
    queue.leave(running)
    assert served(queue, tokens=300) == ["b0", "b1", "b2", "b3", "a1"]


def test_positions_count_what_each_is_expected_to_be_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a0", "a1", "a2"):
        queue.join(name, "a", cost=10)
    for name in ("b0", "b1"):
        queue.join(name, "b", cost=25)
    assert list(queue) == ["a0", "b0", "a1", "a2", "b1"]


def test_idle_time_is_no_claim_beyond_the_credit() -> None:
    queue = queue_of("a0", "b0")
    served(queue, tokens=10)
    queue.join("a1", "a")
    for number in range(100):
        queue.join(f"a{number + 2}", "a")
        served(queue, 1, tokens=50)
    queue.join("b1", "b")
    assert queue.served("a101")[0] - queue.served("b1")[0] == CREDIT


def test_many_who_were_never_here_do_not_go_before_one_who_was() -> None:
    queue = queue_of("a0", "b0")
    served(queue, 1)  # a's
    running = queue.serve()
    queue.charge(running, 500)
    new = [f"{owner}0" for owner in "stuvwxyz"]
    for one in new:
        queue.join(one, one[0])
    assert {queue.served(one)[0] for one in new} == {queue.served(running)[0]}
    queue.join("a1", "a")
    assert queue.served("a1")[0] == queue.served(running)[0] - CREDIT
    assert list(queue) == ["a1", *new]


def test_who_comes_back_from_a_moments_absence_has_the_counter_it_left_with() -> None:
    queue = queue_of("a0", "b0")
    one, other = queue.serve(), queue.serve()
    queue.charge(one, 500)
    queue.leave(one)
    queue.join("a1", "a")
    assert (other, queue.served("a1")[0], queue.served("b0")[0]) == ("b0", 500, 0)


def test_while_others_wait_an_owner_at_its_limit_comes_after_those_below_theirs() -> None:
    queue = queue_of("a0", "a1", "a2", "b0", "b1", limit=1)
    first = queue.serve()
    queue.join("c0", "c")
    queue.charge(first, -1000)
    assert (first, list(queue)[:2]) == ("a0", ["b0", "c0"])
    assert [queue.serve(), queue.serve(), queue.serve()] == ["b0", "c0", "a1"], "all are at their limits"


def test_inside_an_owner_its_users_share_like_owners() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("x0", "x1", "x2", "y0"):
        queue.join(name, "key", name[0])
    queue.join("z0", "address")
    assert list(queue) == ["x0", "z0", "y0", "x1", "x2"]


def test_those_put_back_are_the_next_of_their_owner_the_last_one_first() -> None:
    queue = queue_of("a0", "a1", "a2", "b0")
    first, second, third = (queue.serve() for _ in range(3))
    assert (first, second, third) == ("a0", "b0", "a1")
    queue.put_back(third)
    queue.put_back(first)
    assert [one for one in queue if one[0] == "a"] == ["a0", "a1", "a2"]
    assert queue.leave("a0")
    assert list(queue) == ["a1", "a2"]


@pytest.mark.parametrize(
    ("names", "last"),
    [
        ("a0 a1 b0", "a1"),
        ("b0 a0 a1 a2 b1", "a2"),
        ("a0 b0 c0", "c0"),
        ("a0 a1 b0 b1", "b1"),
        ("b0 b1 a0 a1", "a1"),
    ],
)
def test_the_last_one_is_the_newest_of_whoever_has_most_in_line(names: str, last: str) -> None:
    assert queue_of(*names.split()).last == last


def test_one_that_was_put_back_is_never_the_last() -> None:
    queue = queue_of("a0")
    queue.put_back(queue.serve())
    assert (list(queue), queue.last) == (["a0"], None)
    assert queue_of().last is None
    assert queue_of().next is None


def test_positions_are_told_when_they_change_for_better_or_worse() -> None:
    queue = queue_of("a0", "a1", "a2")
    assert queue.moved() == [("a0", 1), ("a1", 2), ("a2", 3)]
    assert queue.moved() == []
    queue.join("b0", "b")
    assert queue.moved() == [("b0", 2), ("a1", 3), ("a2", 4)]
    queue.leave("a1")
    assert queue.moved() == [("a2", 3)]
    queue.serve()
    assert queue.moved() == [("b0", 1), ("a2", 2)]


def test_those_who_were_never_told_their_position_may_be_told_before_the_others() -> None:
    queue = queue_of("a0", "a1")
    assert queue.moved(only_new=True) == [("a0", 1), ("a1", 2)]
    assert queue.moved() == []
    queue.join("b0", "b")
    assert queue.moved(only_new=True) == [("b0", 2)]
    assert queue.moved(only_new=True) == []
    queue.leave("a0")
    assert queue.moved(only_new=True) == []
    assert queue.moved() == [("a1", 1)]
    assert queue.moved() == []


def test_who_is_not_here_cannot_leave() -> None:
    queue = queue_of("a0", "b0")
    assert [queue.leave(one) for one in ("c0", "a0", "a0")] == [False, True, False]
    assert ("a0" in queue, "b0" in queue) == (False, True)


def test_who_runs_more_than_its_share_yields_at_once_and_else_after_a_quantum() -> None:
    queue = queue_of("a0", "a1", "b0", "b1", limit=1)
    assert [queue.serve() for _ in range(2)] == ["a0", "b0"]
    queue.put_back("b0")
    assert not queue.outranks("b0", "a0", 100)
    queue.charge("a0", 99)
    assert not queue.outranks("b0", "a0", 100)
    queue.charge("a0", 1)
    assert queue.outranks("b0", "a0", 100)
    assert not queue.outranks("a1", "a0", 0), "an owner does not displace itself"
    queue.leave("b0")
    queue.leave("b1")
    queue.serve()
    queue.join("c0", "c")
    assert queue.outranks("c0", "a0", 10**9), "two places are more than its share"


def test_who_was_idle_needs_a_smaller_lead_but_once() -> None:
    queue = queue_of("a0", "b0")
    queue.serve()
    queue.charge("a0", WAKING - 1)
    assert not queue.outranks("b0", "a0", 100)
    queue.charge("a0", 1)
    assert queue.outranks("b0", "a0", 100)
    queue.serve()
    queue.put_back("b0")
    assert not queue.outranks("b0", "a0", 100), "it waits for the quantum now"
    queue.leave("b0")
    queue.join("b1", "b")
    assert queue.outranks("b1", "a0", 100), "it was idle in between"


def test_little_is_kept_of_owners_who_have_nothing_here() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(3 * REMEMBERED):
        queue.join(number, f"owner {number}", f"user {number}")
        assert queue.serve() == number if number % 2 else number in queue
        if number % 2:
            queue.charge(number, 1 + number)
        assert queue.leave(number)
    queue.moved()
    assert not any([queue._share_of, queue._running, queue._told, queue._all.parts])
    assert len(queue._all.idle) <= REMEMBERED


class Naive(RuleBasedStateMachine):
    """The line beside plain lists: who came, in that order, who runs, and what each owner was served."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue()
        self.owner: dict[int, str] = {}
        self.came: dict[str, list[int]] = {owner: [] for owner in OWNERS}
        self.running: list[int] = []
        self.ran: set[int] = set()
        self.told: dict[int, int] = {}

    def waiting(self) -> list[int]:
        return [one for theirs in self.came.values() for one in theirs]

    @rule(owners=st.lists(st.sampled_from(OWNERS), min_size=1, max_size=6), cost=st.integers(1, 50))
    def join(self, owners: list[str], cost: int) -> None:
        for owner in owners:
            one = len(self.owner)
            self.owner[one] = owner
            self.came[owner].append(one)
            self.queue.join(one, owner, cost=cost)

    @precondition(lambda self: self.waiting())
    @rule(tokens=st.integers(0, 100))
    def serve(self, tokens: int) -> None:
        heads = [theirs[0] for theirs in self.came.values() if theirs]
        assert self.queue.next in heads
        one = self.queue.serve()
        assert self.queue.served(one)[0] == min(self.queue.served(head)[0] for head in heads)
        self.came[self.owner[one]].remove(one)
        self.running.append(one)
        self.ran.add(one)
        self.queue.charge(one, tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        one = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.came[self.owner[one]].insert(0, one)
        self.queue.put_back(one)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.integers(0, len(self.owner)))
        assert self.queue.leave(one) == (one in self.running or one in self.waiting())
        self.running = [other for other in self.running if other != one]
        for theirs in self.came.values():
            if one in theirs:
                theirs.remove(one)

    @rule(only_new=st.booleans())
    def tell(self, only_new: bool) -> None:
        now = {one: place for place, one in enumerate(self.queue, 1)}
        told = dict(self.queue.moved(only_new))
        assert told.items() <= now.items()
        self.told = {one: told.get(one, self.told.get(one, 0)) for one in now}
        assert all(place for one, place in self.told.items() if one not in self.ran)
        if not only_new:
            assert self.told == now

    @invariant()
    def it_is_the_line_that_the_lists_make(self) -> None:
        order = list(self.queue)
        assert sorted(order) == sorted(self.waiting())
        assert len(self.queue) == len(order)
        for owner, theirs in self.came.items():
            assert [one for one in order if self.owner[one] == owner] == theirs
        assert all((one in self.queue) == (one in order) for one in range(len(self.owner) + 1))
        new = Counter(self.owner[one] for one in order if one not in self.ran)
        last = self.queue.last
        assert (last is None) == (not new)
        assert last is None or (last not in self.ran and new[self.owner[last]] == max(new.values()))


Naive.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestNaive = Naive.TestCase
