"""When one who was turned away should come again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM.engine.retry import LONGEST, SHORTEST, UNMEASURED, RetryAfter


def test_before_anything_has_run_it_is_what_the_documents_say() -> None:
    assert RetryAfter().guess(200, 1) == UNMEASURED == 1.0


@pytest.mark.parametrize(
    ("place", "capacity", "seconds"), [(1, 1, 6.0), (4, 8, 3.0), (16, 8, 12.0), (999, 1, 60), (1, 99, 0.1)]
)
def test_it_is_the_time_that_a_request_takes_by_the_place_in_line(place: int, capacity: int, seconds: float) -> None:
    retry = RetryAfter()
    for _ in range(3):
        retry.ran(6.0)
    assert retry.guess(place, capacity) == pytest.approx(seconds)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 60))
def test_the_last_requests_count_most_and_it_stays_within_bounds(before: list[float], now: float) -> None:
    retry = RetryAfter()
    for seconds in [*before, *[now] * 100]:
        retry.ran(seconds)
    guess = retry.guess(1, 1)
    assert SHORTEST <= guess <= LONGEST
    assert guess == pytest.approx(max(now, SHORTEST), abs=1e-3)
