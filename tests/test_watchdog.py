"""The watchdog over an engine's steps, with a clock that only the test moves."""

import pytest

from LLM.engine.watchdog import Watchdog
from tests.scripted import SetClock


class Dog(Watchdog):
    """Watches a step of the test's."""

    def __init__(self) -> None:
        self.clock, self.began, self.barks = SetClock(), None, 0
        super().__init__(self.clock, 120, lambda: self.began, self.bark)

    def bark(self) -> None:
        self.barks += 1

    def begin(self) -> None:
        self.began = self.clock.now()


def test_it_barks_once_when_a_step_takes_too_long_and_then_looks_no_more() -> None:
    dog = Dog()
    dog.begin()
    dog.watch()
    dog.watch()
    assert dog.clock.ahead == [120]
    dog.clock.go(119)
    assert dog.barks == 0
    dog.clock.go(1)
    dog.clock.go(1000)
    assert (dog.barks, dog.clock.ahead) == (1, [])


def test_many_steps_together_may_take_as_long_as_they_like_and_so_may_the_time_between_them() -> None:
    dog = Dog()
    dog.watch()
    for _ in range(50):
        dog.began = None
        dog.clock.go(1000)
        dog.begin()
        dog.clock.go(119)
    assert dog.barks == 0
    assert dog.clock.ahead == [1], "it looks when the step that it saw would have taken too long"


def test_a_step_that_hung_before_it_watched_is_noticed_at_once() -> None:
    dog = Dog()
    dog.begin()
    dog.clock.go(120)
    dog.watch()
    assert dog.barks == 1


@pytest.mark.parametrize("watched", [True, False])
def test_it_does_not_look_while_it_rests(watched: bool) -> None:
    dog = Dog()
    dog.begin()
    if watched:
        dog.watch()
    dog.rest()
    assert dog.clock.ahead == []
    dog.clock.go(100)
    dog.watch()
    assert dog.clock.ahead == [20]
