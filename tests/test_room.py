"""Who leaves so that a model fits: never one in use, never more than needed, the least recently used first."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM._base_model_handler import LoadOptions, Plan
from LLM.errors import Refused
from LLM.room import GIB, MOST_MODELS, leaving


@dataclass
class Someone:
    name: str
    device: str
    memory_bytes: int
    left_at: float | None
    pinned: bool = False


def plan(memory_bytes: int, device: str = "cpu", device_bytes: int = 100) -> Plan:
    return Plan(LoadOptions(device=device), memory_bytes, device_bytes)


def asked(wanted: Plan, residents: list[Someone], memory: int) -> list[Someone] | str:
    """Give who leaves, or the reason for a refusal."""
    try:
        return leaving(wanted, residents, memory)
    except Refused as refused:
        return refused.reason


RESIDENTS = st.lists(
    st.builds(
        Someone,
        name=st.sampled_from("abcdef"),
        device=st.sampled_from(["cpu", "cuda:0"]),
        memory_bytes=st.integers(0, 40),
        left_at=st.none() | st.floats(0, 100),
    ),
    max_size=MOST_MODELS,
)


@given(RESIDENTS, st.integers(0, 120), st.integers(0, 120))
def test_those_who_leave_are_few_enough_and_many_enough(residents: list[Someone], need: int, budget: int) -> None:
    here = [r for r in residents if r.device == "cpu"]
    idle = [r for r in residents if r.left_at is not None]

    def fits(gone: list[Someone]) -> bool:
        taken = sum(r.memory_bytes for r in here if not any(r is other for other in gone))
        return (taken + need <= budget or not need) and len(residents) - len(gone) < MOST_MODELS

    found = asked(plan(need), residents, budget)
    assert (found == "load_failed") == (need > budget)
    if isinstance(found, str):
        assert need > budget or (found == "overloaded" and not fits(idle))
        return
    assert fits(found)
    assert all(r.left_at is not None for r in found)
    # None could stay: each is needed beside those who left before it.
    for number, last in enumerate(found):
        before = found[:number]
        assert not fits(before)
        assert len(residents) == MOST_MODELS or last.device == "cpu"
    times = [r.left_at for r in found]
    assert times == sorted(times, key=lambda t: t or 0.0)


@given(RESIDENTS)
def test_what_takes_nothing_needs_a_place_all_the_same(residents: list[Someone]) -> None:
    full = [*residents, *(Someone("x", "cpu", 0, None) for _ in range(MOST_MODELS - len(residents)))]
    found = asked(plan(0), full, 1000)
    if all(r.left_at is None for r in full):
        assert found == "overloaded"
    else:
        assert len(found) == 1


def test_what_takes_nothing_fits_beside_a_pinned_model_where_its_own_device_has_no_memory() -> None:
    pinned = Someone("big", "cpu", 90, None, pinned=True)
    assert leaving(plan(0, device_bytes=0), [pinned], None) == []


def test_without_a_word_from_the_operator_nine_tenths_of_the_device_are_to_be_had() -> None:
    assert leaving(plan(90, device_bytes=100), [], None) == []
    with pytest.raises(Refused) as refused:
        leaving(plan(91, device_bytes=100), [], None)
    assert refused.value.reason == "load_failed"


def test_sizes_are_told_in_words() -> None:
    with pytest.raises(Refused, match=r"takes 3\.5 GiB .* may take 1\.0 MiB on cuda:1"):
        leaving(plan(7 * GIB // 2, "cuda:1"), [], 1 << 20)


def test_a_model_on_all_gpus_and_one_on_a_gpu_take_memory_from_each_other() -> None:
    idle = Someone("idle", "cuda:1", 60, left_at=1.0)
    assert leaving(plan(70, "cuda"), [idle], 100) == [idle]
    assert leaving(plan(70, "cuda:1"), [Someone("spread", "cuda", 60, left_at=1.0)], 100)
    assert leaving(plan(70, "cuda:0"), [idle], 100) == []
    assert leaving(plan(70, "cpu"), [Someone("spread", "cuda", 60, left_at=1.0)], 100) == []


def test_the_operator_says_how_many_models_there_may_be() -> None:
    one, two = Someone("one", "cpu", 1, left_at=1.0), Someone("two", "cpu", 1, left_at=2.0)
    assert leaving(plan(1), [one, two], 100, most=2) == [one]
    assert leaving(plan(1), [one, two], 100, most=2, last=[one]) == [two]
    assert leaving(plan(1), [one, two], 100, most=3) == []
    with pytest.raises(Refused, match="in use or always kept loaded: one;"):
        leaving(plan(1), [Someone("one", "cpu", 1, left_at=None, pinned=True)], 100, most=1)
