import pytest

from wsserver.liveness import SILENT_AFTER, Liveness, Traffic, Verdict, ping_interval

STALL = 30.0


def watched(*looks: tuple[float, Traffic]) -> list[tuple[float, Verdict]]:
    """Give what was found wrong, with the time, of a connection that began at 0 seconds."""
    liveness = Liveness(0.0, STALL)
    found = [(now, liveness.verdict(now, traffic)) for now, traffic in looks]
    return [(now, verdict) for now, verdict in found if verdict]


def test_a_peer_that_takes_and_answers_is_left_alone() -> None:
    assert watched(*[(t, Traffic(t * 10, t // 10, 0)) for t in range(1000)]) == []


def test_an_idle_peer_is_left_alone_while_it_acknowledges_its_pings() -> None:
    # A ping every ten seconds, answered within the second.
    looks = [(t, Traffic(t // 10 * 2, (t - 1) // 10 * 6, 2 if t % 10 == 0 else 0)) for t in range(1, 1000)]
    assert watched(*looks) == []


def test_a_peer_that_takes_nothing_is_stalled_after_the_timeout_and_not_before() -> None:
    looks = [(t, Traffic(min(t, 50), 7, 9000)) for t in range(100)]
    assert watched(*looks)[0] == (80, "stalled")


def test_what_it_says_does_not_help_a_peer_that_takes_nothing() -> None:
    assert watched(*[(t, Traffic(0, t * 100, 9000)) for t in range(50)])[0] == (30, "stalled")


def test_the_slowest_reader_is_not_stalled() -> None:
    assert watched(*[(t, Traffic(t // 29, t // 100, 9000)) for t in range(290)]) == []


def test_what_has_just_been_sent_may_wait_for_its_answer() -> None:
    # Nothing was sent for a minute, and then something a moment before a look.
    looks = [(1, Traffic(5, 1, 0)), (60, Traffic(5, 2, 100)), (61, Traffic(105, 2, 0))]
    assert watched(*looks) == []
    assert watched(*looks[:2], (61, Traffic(5, 2, 100))) == [(61, "stalled")]


def test_a_peer_that_vanishes_while_idle_is_found_in_time_by_the_ping_after_it() -> None:
    assert ping_interval(STALL) == 10
    looks = []
    for t in range(100):
        pinged = t // 10 * 6
        taken = min(pinged, 6)  # the ping at ten seconds was the last one it took
        looks.append((t, Traffic(taken, 10 if t >= 10 else 0, pinged - taken)))
    assert watched(*looks)[0] == (40, "stalled")


def test_a_peer_that_answers_no_ping_is_silent_though_something_acknowledges_for_it() -> None:
    looks = [(t, Traffic(t // 10 * 6, 10 * min(t // 10, 4), 0)) for t in range(1, 100)]
    assert watched(*looks)[0] == (40 + STALL, "silent")


def test_a_peer_that_has_taken_much_may_be_silent_for_long_but_not_for_ever() -> None:
    looks = [(t, Traffic(6000 if t > 2 else 0, 6, 0)) for t in range(1, int(SILENT_AFTER) + 9)]
    assert watched(*looks)[0] == (1 + SILENT_AFTER, "silent")
    assert watched(*[(t, Traffic(t * 99, 6 + t // 200, 0)) for t in range(1, 1000)]) == []


@pytest.mark.parametrize("timeout", [0.3, 3, 30, 300])
def test_pings_are_frequent_enough_for_the_timeout_and_no_more_frequent_than_that(timeout: float) -> None:
    assert ping_interval(timeout) == min(10, timeout / 3)
