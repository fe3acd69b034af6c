"""Pacing on simulated machines: what a step costs is known here, and pacing has to find it out."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM.engine.pacing import FIRST_GUESS, SMALLEST, STALE, Pacing

LARGEST = 2048
Cost = Callable[[int, int], float]

costs = st.floats(1e-5, 1e-1)


def linear(decode: float, token: float) -> Cost:
    """A machine whose steps cost the same for any number of streams, and as much again for each prompt token."""
    return lambda streams, prompt_tokens: decode + token * prompt_tokens


EXACT = linear(1.0, 1 / 64)  # numbers that no rounding touches: 128 tokens take what two decode steps do


def step(pacing: Pacing, cost: Cost, waiting: int, streams: int = 1) -> int:
    """Run one step beside `streams`, with so many prompt tokens waiting; give how many it carried."""
    carried = min(pacing.prefill_budget(streams), waiting)
    pacing.measured(streams, carried, cost(streams, carried))
    return carried


def steps(pacing: Pacing, cost: Cost, count: int, waiting: int = 10**9, streams: int = 1) -> list[int]:
    return [step(pacing, cost, waiting, streams) for _ in range(count)]


def measured(cost: Cost, stretch: float = 3.0, largest: int = LARGEST) -> Pacing:
    """Give one that has seen a decode step and a first chunk."""
    pacing = Pacing(largest, stretch)
    assert steps(pacing, cost, 2) == [0, min(FIRST_GUESS, largest)]
    return pacing


@pytest.mark.parametrize("largest", [1, 64, LARGEST])
def test_with_no_stream_to_hold_up_a_step_carries_all_it_can(largest: int) -> None:
    assert Pacing(largest).prefill_budget(0) == largest
    assert measured(linear(0.01, 0.01), largest=largest).prefill_budget(0) == largest


def test_beside_streams_first_comes_a_step_to_measure_by_then_a_guess_then_what_was_measured() -> None:
    pacing = Pacing(LARGEST, stretch=3)
    assert steps(pacing, EXACT, 2) == [0, FIRST_GUESS]
    assert steps(pacing, EXACT, 8)[-1] == 128


@pytest.mark.parametrize(("largest", "guess"), [(16, 16), (31, 31), (33, FIRST_GUESS)])
def test_the_first_guess_is_no_more_than_a_step_may_carry(largest: int, guess: int) -> None:
    assert steps(Pacing(largest), linear(1, 1), 2) == [0, guess]


def test_a_prompt_that_ran_alone_before_any_stream_teaches_nothing_yet() -> None:
    pacing = Pacing(LARGEST)
    pacing.measured(0, 500, 1.0)
    assert steps(pacing, EXACT, 2) == [0, FIRST_GUESS]


def test_a_prompt_that_runs_alone_later_is_measured_too() -> None:
    pacing = Pacing(LARGEST)
    pacing.measured(1, 0, EXACT(1, 0))
    pacing.measured(0, 400, EXACT(0, 400))
    assert pacing.prefill_budget(1) == 128


def test_the_measure_goes_stale_and_one_step_without_prompts_renews_it() -> None:
    pacing = Pacing(LARGEST)
    carried = steps(pacing, EXACT, 2 * STALE + 5)
    assert [index for index, tokens in enumerate(carried) if tokens == 0] == [0, STALE + 1, 2 * STALE + 2]


def test_prompts_that_run_alone_make_nothing_stale() -> None:
    pacing = measured(EXACT)
    for _ in range(2 * STALE):
        pacing.measured(0, 100, 0.030)
    assert pacing.prefill_budget(1) > 0


@given(decode=costs, token=costs, stretch=st.floats(1.5, 10), streams=st.integers(1, 64))
def test_a_step_takes_as_long_as_it_may_and_no_longer(decode: float, token: float, stretch: float, streams: int) -> None:
    pacing = measured(cost := linear(decode, token), stretch)
    longest = stretch * decode * (1 + 1e-9)
    for number, carried in enumerate(steps(pacing, cost, 3 * STALE, streams=streams)):
        assert cost(streams, carried) <= longest or carried == SMALLEST
        learning = number < 12
        assert learning or carried in (0, LARGEST) or cost(streams, carried + 2) > longest, "it could have carried more"


def bent(free: int) -> Cost:
    """A machine that computes so many tokens while it reads the weights, as a GPU does, and takes longer only for more."""
    return lambda streams, prompt_tokens: max(1.0, (streams + prompt_tokens) / free)


@pytest.mark.parametrize("short", [1, 8, 30, 200])
def test_chunks_that_cost_nothing_do_not_lead_to_one_that_freezes_the_streams(short: int) -> None:
    pacing, cost = Pacing(LARGEST), bent(free=200)
    steps(pacing, cost, 3, waiting=0)
    steps(pacing, cost, 50, waiting=short)
    assert max(cost(1, carried) for carried in steps(pacing, cost, 40)) <= 5


@given(free=st.integers(2 * FIRST_GUESS, 600), prompts=st.lists(st.integers(1, 1500), min_size=1, max_size=12))
def test_whatever_prompts_come_no_step_takes_twice_as_long_as_it_may(free: int, prompts: list[int]) -> None:
    pacing, cost = Pacing(LARGEST, stretch=3), bent(free)
    for waiting in prompts:
        step(pacing, cost, 0)
        while waiting:
            carried = step(pacing, cost, waiting)
            waiting -= carried
            assert cost(1, carried) <= 2 * 3


@pytest.mark.parametrize(("token", "carried"), [(1.0, SMALLEST), (1e-9, LARGEST), (0.0, LARGEST)])
def test_a_chunk_is_never_a_crumb_and_never_more_than_a_step_may_carry(token: float, carried: int) -> None:
    assert steps(measured(linear(0.010, token)), linear(0.010, token), 20)[-1] == carried


@pytest.mark.parametrize("largest", [1, 5])
def test_a_step_that_may_carry_only_crumbs_carries_them(largest: int) -> None:
    assert steps(Pacing(largest), linear(0.010, 1.0), 4) == [0, largest, largest, largest]


def test_steps_with_prompts_that_were_quicker_than_those_without_are_soon_made_up_for() -> None:
    pacing = measured(EXACT)
    for _ in range(10):
        pacing.measured(1, SMALLEST, 0.0)
    assert max(EXACT(1, carried) for carried in steps(pacing, EXACT, 20)) <= 1.1 * 3


@pytest.mark.parametrize(("before", "after"), [(0.010, 0.080), (0.080, 0.010)])
def test_when_decode_steps_become_slower_or_faster_prompts_follow(before: float, after: float) -> None:
    token = 0.0005
    pacing = measured(linear(before, token))
    steps(pacing, linear(before, token), 10)
    changed = linear(after, token)
    steps(pacing, changed, 20, waiting=0)
    steps(pacing, changed, 20)
    assert steps(pacing, changed, 1) == [pytest.approx(2 * after / token, rel=0.02)]


@pytest.mark.parametrize(("before", "after"), [(0.0001, 0.0008), (0.0008, 0.0001)])
def test_when_prompt_tokens_become_slower_or_faster_a_few_steps_tell(before: float, after: float) -> None:
    pacing = measured(linear(0.010, before))
    steps(pacing, linear(0.010, before), 8)
    assert steps(pacing, linear(0.010, after), 16)[-1] == pytest.approx(2 * 0.010 / after, rel=0.05)


def test_after_a_shrink_no_step_carries_more_than_half_until_there_is_nothing_left_to_halve() -> None:
    pacing = measured(linear(0.010, 1e-9), largest=100)
    largest = []
    while pacing.shrink():
        largest.append(pacing.largest)
        assert pacing.prefill_budget(0) == pacing.largest
        assert 0 < pacing.prefill_budget(1) <= pacing.largest
    assert largest == [50, 25, 12, 6]
    assert not pacing.shrink()
    assert pacing.largest == 6
