"""The lock around loads: one at a time, a wait that can be given up, and a holder that is named in the log."""

import logging
import threading
from itertools import count

import pytest
import torch

from LLM.loading.exclusive import TELL_EVERY, Exclusive


class GivenUp(Exception):
    pass


def give_up() -> None:
    raise GivenUp


def go_on() -> None:
    """Wait on."""


def test_a_wait_can_be_given_up_and_the_lock_still_goes_to_the_next():
    lock = Exclusive()
    with lock.hold("acme/first", go_on), pytest.raises(GivenUp), lock.hold("acme/second", give_up):
        pytest.fail("two held it")
    with lock.hold("acme/third", give_up):
        pass


def test_a_holder_that_fails_lets_the_next_one_in():
    lock = Exclusive()
    with pytest.raises(OSError, match="disk"), lock.hold("acme/first", go_on):
        raise OSError("disk")
    with lock.hold("acme/second", give_up):
        pass


def test_a_long_wait_names_the_holder_in_the_log(caplog: pytest.LogCaptureFixture):
    times = count(0.0, TELL_EVERY)
    lock = Exclusive(clock=lambda: next(times))
    looks = iter([go_on, go_on, give_up])
    caplog.set_level(logging.WARNING)
    with lock.hold("acme/first", go_on), pytest.raises(GivenUp), lock.hold("acme/second", lambda: next(looks)()):
        pytest.fail("two held it")
    assert "loading acme/second waits for the load of acme/first to end" in caplog.text


def test_never_two_at_once():
    lock, inside, most = Exclusive(), 0, 0

    def load() -> None:
        nonlocal inside, most
        with lock.hold("acme/one", go_on):
            inside += 1
            most = max(most, inside)
            inside -= 1

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_default_dtype_that_a_library_lost_is_put_back_and_logged(caplog: pytest.LogCaptureFixture):
    with Exclusive().hold("acme/first", go_on):
        torch.set_default_dtype(torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert "left torch's default dtype changed" in caplog.text
