"""When a model whose engine died is loaded anew: by itself or not, and after how long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM.restarts import FIRST, LONGEST, QUIET, Restarts


def after(*times: float) -> Restarts:
    """Deaths at these times, each followed by a load at once."""
    restarts = Restarts()
    for time in times:
        restarts.died(time)
        restarts.loaded(time)
    return restarts


def test_a_model_that_never_died_may_be_loaded_at_once() -> None:
    restarts = Restarts()
    restarts.loaded(5)
    assert (restarts.back_off(5), restarts.down, restarts.count, restarts.forgotten(5)) == (0, False, 0, True)


def test_after_its_first_death_it_is_loaded_by_itself_after_a_second() -> None:
    restarts = Restarts()
    restarts.died(100)
    assert (restarts.down, restarts.by_itself, restarts.back_off(100), restarts.back_off(100.75)) == (True, True, 1, 0.25)
    assert restarts.back_off(102) == 0
    restarts.loaded(102)
    assert (restarts.down, restarts.by_itself, restarts.count) == (False, False, 1)


@pytest.mark.parametrize(("quiet", "by_itself", "back_off"), [(QUIET - 1, False, 2), (QUIET, True, 1)])
def test_after_another_soon_it_waits_for_somebody_to_ask(quiet: float, by_itself: bool, back_off: float) -> None:
    restarts = after(100)
    restarts.died(100 + quiet)
    assert (restarts.by_itself, restarts.back_off(100 + quiet)) == (by_itself, back_off)


def test_the_back_off_doubles_with_each_death_in_a_row_up_to_a_minute_and_is_forgotten() -> None:
    restarts, seconds, now = Restarts(), [], 0.0
    for _ in range(2000):
        restarts.died(now)
        seconds.append(restarts.back_off(now))
        now += seconds[-1]
        restarts.loaded(now)
    assert seconds[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert set(seconds[8:]) == {60}
    assert restarts.count == 2000
    restarts.died(now + QUIET)
    assert restarts.back_off(now + QUIET) == 1


def test_the_quiet_counts_from_the_load_and_not_from_the_death() -> None:
    restarts = Restarts()
    restarts.died(0)
    restarts.loaded(1000)
    restarts.died(1100)
    assert not restarts.by_itself


def test_what_was_given_up_waits_for_somebody_to_ask() -> None:
    restarts = Restarts()
    restarts.died(0)
    restarts.gave_up()
    assert (restarts.down, restarts.by_itself) == (True, False)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1))
def test_never_twice_by_itself_without_a_quiet_time_between(lives: list[tuple[int, int]]) -> None:
    """Each life is how long a load took, and how long the model then lived."""
    restarts, now = Restarts(), 0
    for number, (load, life) in enumerate(lives):
        restarts.loaded(now := now + load)
        restarts.died(now := now + life)
        assert restarts.by_itself == (number == 0 or life >= QUIET)
        assert FIRST <= restarts.back_off(now) <= LONGEST
        assert restarts.count == number
