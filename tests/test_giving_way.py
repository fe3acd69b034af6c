"""The switch interval is short while a model is loaded, and the usual one at all other times."""

import sys
import threading

import pytest

from LLM.giving_way import SWITCH_INTERVAL, USUAL, giving_way
from wsserver.__main__ import run_server
from wsserver.config import Config


def test_the_interval_is_short_meanwhile_and_the_usual_one_after_that_also_after_an_error() -> None:
    with giving_way():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    assert sys.getswitchinterval() == pytest.approx(USUAL)
    with pytest.raises(OSError, match="disk"), giving_way():
        raise OSError("disk")
    assert sys.getswitchinterval() == pytest.approx(USUAL)


def test_one_at_a_time_or_two_the_usual_one_comes_back() -> None:
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
    assert sys.getswitchinterval() == pytest.approx(USUAL)


def test_a_process_that_serves_is_more_polite_than_python_is() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    try:
        with pytest.raises(SystemExit, match="--host"):
            run_server(Config(host="192.0.2.1"))
        assert sys.getswitchinterval() == pytest.approx(USUAL)
    finally:
        sys.setswitchinterval(before)
