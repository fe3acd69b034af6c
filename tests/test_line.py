"""The line of those who wait: fair between owners, first come first served for each, and true positions."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from LLM.engine.line import Line

OWNERS = "abcd"


def line_of(*names: str) -> Line[str]:
    """A line of those named, each by its owner's letter and a number."""
    line: Line[str] = Line()
    for name in names:
        line.join(name, name[0])
    return line


def served(line: Line[str], count: int | None = None) -> list[str]:
    return [line.serve() for _ in range(len(line) if count is None else count)]


def test_what_one_owner_has_in_line_is_served_as_it_came() -> None:
    names = [f"a{number}" for number in range(50)]
    assert served(line_of(*names)) == names


def test_one_among_another_owners_fifty_waits_for_one_of_them() -> None:
    line = line_of(*(f"a{number}" for number in range(50)), "b0")
    assert served(line, 3) == ["a0", "b0", "a1"]


def test_owners_take_turns_also_with_one_who_comes_in_the_middle() -> None:
    line = line_of("a0", "a1", "a2", "a3", "b0", "b1", "b2")
    assert served(line, 3) == ["a0", "b0", "a1"]
    line.join("c0", "c")
    line.join("c1", "c")
    assert list(line) == ["b1", "a2", "c0", "b2", "a3", "c1"] == served(line)


def test_who_comes_back_with_one_more_each_time_is_served_no_more_often_than_the_others() -> None:
    line = line_of(*(f"a{number}" for number in range(9)), "b0", "c0")
    begun: Counter[str] = Counter()
    for number in range(1, 10):
        for one in served(line, 3):
            begun[one[0]] += 1
            if one[0] != "a":
                line.join(f"{one[0]}{number}", one[0])
    assert begun == {"a": 9, "b": 9, "c": 9}


def test_those_put_back_are_next_the_last_one_first_and_cost_no_turn() -> None:
    line = line_of("a0", "a1", "b0")
    first, second = served(line, 2)
    line.put_back(second)
    line.put_back(first)
    assert (len(line), list(line)) == (3, ["a0", "b0", "a1"])
    assert line.leave("b0")
    assert served(line) == ["a0", "a1"]


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
def test_the_last_one_is_the_last_of_whoever_has_most_in_line(names: str, last: str) -> None:
    line = line_of(*names.split())
    assert line.last == last == list(line)[-1]


def test_one_that_was_put_back_is_never_the_last() -> None:
    line = line_of("a0")
    line.put_back(line.serve())
    assert (list(line), line.last) == (["a0"], None)
    assert line_of().last is None


def test_positions_are_told_when_they_change_for_better_or_worse() -> None:
    line = line_of("a0", "a1", "a2")
    assert line.moved() == [("a0", 1), ("a1", 2), ("a2", 3)]
    assert line.moved() == []
    line.join("b0", "b")
    assert line.moved() == [("b0", 2), ("a1", 3), ("a2", 4)]
    line.leave("a1")
    assert line.moved() == [("a2", 3)]
    line.serve()
    assert line.moved() == [("b0", 1), ("a2", 2)]


def test_who_is_not_in_line_cannot_leave_it() -> None:
    line = line_of("a0", "b0")
    assert [line.leave(one) for one in ("c0", "a0", "a0")] == [False, True, False]
    assert ("a0" in line, "b0" in line) == (False, True)


def test_nothing_is_kept_of_owners_who_have_nobody_in_line() -> None:
    line: Line[int] = Line()
    for number in range(1000):
        line.join(number, f"owner {number}")
        assert line.serve() == number if number % 2 else line.leave(number)
        assert line.moved() == []
    assert not any([line._owners, line._owner_of, line._put_back, line._told])


class Naive(RuleBasedStateMachine):
    """The line beside plain lists: who came, in that order, and whose turn comes after whose."""

    def __init__(self) -> None:
        super().__init__()
        self.line: Line[int] = Line()
        self.came: list[tuple[int, str]] = []
        self.turns: list[str] = []
        self.back: list[int] = []
        self.gone: list[int] = []
        self.told: dict[int, int] = {}
        self.count = 0

    def order(self) -> list[int]:
        """Each owner's first in the order of the turns, then each one's second, and so on."""
        nth: Counter[str] = Counter()
        places = []
        for one, owner in self.came:
            places.append((nth[owner], self.turns.index(owner), one))
            nth[owner] += 1
        return self.back + [one for *_, one in sorted(places)]

    def forget(self, one: int) -> None:
        if one in self.back:
            self.back.remove(one)
        self.came = [(other, owner) for other, owner in self.came if other != one]
        self.turns = [owner for owner in self.turns if owner in {owner for _, owner in self.came}]

    @rule(owners=st.lists(st.sampled_from(OWNERS), min_size=1, max_size=6))
    def join(self, owners: Iterable[str]) -> None:
        for owner in owners:
            self.count += 1
            self.came.append((self.count, owner))
            if owner not in self.turns:
                self.turns.append(owner)
            self.line.join(self.count, owner)

    @precondition(lambda self: self.line)
    @rule()
    def serve(self) -> None:
        one = self.order()[0]
        owner = dict(self.came).get(one)
        self.forget(one)
        if owner in self.turns:
            self.turns.append(self.turns.pop(self.turns.index(owner)))
        assert self.line.serve() == one
        self.gone.append(one)

    @precondition(lambda self: self.gone)
    @rule()
    def put_back(self) -> None:
        self.back.insert(0, self.gone.pop())
        self.line.put_back(self.back[0])

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.integers(0, self.count))
        assert self.line.leave(one) == (one in self.order())
        self.forget(one)

    @rule()
    def tell(self) -> None:
        now = {one: place for place, one in enumerate(self.order(), 1)}
        assert self.line.moved() == [(one, place) for one, place in now.items() if self.told.get(one) != place]
        self.told = now

    @invariant()
    def it_is_the_line_that_the_lists_make(self) -> None:
        order = self.order()
        assert (list(self.line), len(self.line)) == (order, len(order))
        assert all((one in self.line) == (one in order) for one in range(self.count + 1))
        joined = order[len(self.back) :]
        assert self.line.last == (joined[-1] if joined else None)


Naive.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
TestNaive = Naive.TestCase


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(0, 3)), max_size=40), st.data())
def test_who_always_has_somebody_in_line_is_served_as_often_as_any_other_such_in_every_span(
    more: list[tuple[str, int]], data: st.DataObject
) -> None:
    line, order, came = line_of(*(f"{owner}0" for owner in OWNERS)), [], 0
    for owner, extra in more:
        one = line.serve()
        order.append(one[0])
        line.join(f"{one[0]} {len(order)}", one[0])
        for _ in range(extra):
            came += 1
            line.join(f"{owner}+{came}", owner)
    first = data.draw(st.integers(0, len(order)))
    span = Counter(order[first : data.draw(st.integers(first, len(order)))])
    counts = [span[owner] for owner in OWNERS]
    assert max(counts) - min(counts) <= 1
