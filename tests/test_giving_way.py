"""The switch interval is short while a model is loaded, and Python's own at all other times."""

import sys
import threading

import pytest

from LLM.giving_way import SWITCH_INTERVAL, USUAL, giving_way


def test_the_interval_is_short_meanwhile_and_pythons_own_after_that_also_after_an_error() -> None:
    with giving_way():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    assert sys.getswitchinterval() == USUAL
    with pytest.raises(OSError, match="disk"), giving_way():
        raise OSError("disk")
    assert sys.getswitchinterval() == USUAL


def test_one_at_a_time_or_two_pythons_own_comes_back() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with giving_way():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with giving_way():
        thread.start()
        entered.wait(30)
    leave.set()
    thread.join()
    assert sys.getswitchinterval() == USUAL


def test_the_first_of_two_to_end_leaves_the_interval_short_for_the_other() -> None:
    with giving_way():
        with giving_way():
            pass
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    assert sys.getswitchinterval() == USUAL
