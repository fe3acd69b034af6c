"""The judge over connections: a generation that is resumed. What it says of a single one is in test_contract.py."""

from typing import Any

import pytest

from tests.asked import Resumable
from tests.checker import Checker
from tests.test_contract import CANCEL, CANCELLED, DONE, STARTED, G, error, judge, status, token

R = {**G, "resumable": True}
BEGUN = {**STARTED, "resume_token": "t"}
DETACHED = {"type": "detached", "id": "g"}
ASK = {"type": "status"}


def resume(after_seq: int = 0, resume_token: str = "t") -> dict[str, Any]:
    return {"type": "resume", "id": "g", "resume_token": resume_token, "after_seq": after_seq}


def resumed(seq: int = 0) -> dict[str, Any]:
    return {"type": "resumed", "id": "g", "seq": seq}


def expired() -> dict[str, Any]:
    return error("resume_expired", id="g")


# What the first connection has seen, what was sent on the second, what came there, and what the judge has to say of it.
SEEN = [BEGUN, token(0, 1, "h"), token(1, 2, "el")]
BROKEN = [
    (SEEN, [], [resumed(3)], "was not sent"),
    (SEEN, [resume(3)], [resumed(1)], "elsewhere"),
    (SEEN, [resume(3)], [resumed(3), resumed(3)], "active here"),
    (SEEN, [resume(3), resume(3)], [resumed(3), token(3), resumed(3)], "active here"),
    (SEEN, [resume(3, "other")], [resumed(3)], "nobody was given"),
    (SEEN, [resume(3)], [resumed(3), token(4)], "gap"),
    (SEEN, [resume(1)], [resumed(1), token(3)], "gap"),
    (SEEN, [resume(1)], [resumed(1), token(1, 2, "another")], "another text"),
    (SEEN, [resume(3)], [token(3)], "not open"),
    (SEEN, [resume(3)], [resumed(3), {**BEGUN}], "started after resumed"),
    (SEEN, [resume(3)], [resumed(3), DONE, token(3)], "not open"),
    (SEEN, [resume(3)], [resumed(3), DONE, DONE], "not open"),
    (SEEN, [resume(3)], [resumed(3), CANCELLED], "by nobody"),
    (SEEN, [resume(3), ASK], [status()], "went unanswered"),
    (SEEN, [resume(3), ASK], [resumed(3), status()], "does not say so"),
    (SEEN, [resume(3), CANCEL, ASK], [resumed(3), status("g"), token(3)], "had been read"),
    ([], [], [expired()], "was not sent"),
    (SEEN, [resume(3)], [expired(), resumed(3)], "was not sent"),
]
FAIR = [
    (SEEN, [resume(3)], [resumed(3), token(3, 2, "lo"), DONE]),
    (SEEN, [resume(1)], [resumed(1), token(1, 4, "ello"), DONE]),
    (SEEN, [resume(0)], [resumed(0), {"type": "prefill", "id": "g", "done": 1, "total": 2}, token(0, 5, "hello"), DONE]),
    (SEEN, [resume(3), ASK], [resumed(3), status("g"), DONE]),
    (SEEN, [resume(3), CANCEL], [resumed(3), CANCELLED]),
    (SEEN, [CANCEL, resume(3)], [error("not_active", id="g"), resumed(3), DONE]),
    (SEEN, [resume(3)], [expired()]),
    (SEEN, [resume(2), resume(3)], [{**error("bad_message", id="g"), "message": "$.after_seq: x"}, resumed(3), DONE]),
    (SEEN, [resume(3), resume(3)], [resumed(3), error("duplicate_id", id="g"), token(3, 2, "lo"), DONE]),
    (
        SEEN,  # what is asked anew may be let in where the resume before it was refused
        [resume(3), resume(3), {**G, "resumable": True}, ASK],
        [resumed(3), error("duplicate_id", id="g"), DONE, {**BEGUN, "resume_token": "u"}, status("g"), DONE],
    ),
    ([*SEEN, token(3, 2, "lo"), DONE], [resume(1)], [resumed(1), token(1, 4, "ello"), DONE]),
    (SEEN, [resume(3)], [resumed(3), token(3), DETACHED]),
]


def judge_of_the_second(seen: list[dict[str, Any]], sent: list[dict[str, Any]], received: list[dict[str, Any]]) -> Checker:
    resumable: Resumable = {}
    judge([R], seen, resumable)
    return judge(sent, received, resumable)


@pytest.mark.parametrize(("seen", "sent", "received", "objection"), BROKEN, ids=range(len(BROKEN)))
def test_the_judge_objects_to_every_broken_rule_of_resuming(
    seen: list[dict[str, Any]], sent: list[dict[str, Any]], received: list[dict[str, Any]], objection: str
) -> None:
    judge_of_the_second(seen, sent, received[:-1])
    with pytest.raises(AssertionError, match=objection):
        judge_of_the_second(seen, sent, received)


@pytest.mark.parametrize(("seen", "sent", "received"), FAIR, ids=range(len(FAIR)))
def test_the_judge_lets_a_fair_resume_pass(
    seen: list[dict[str, Any]], sent: list[dict[str, Any]], received: list[dict[str, Any]]
) -> None:
    judge_of_the_second(seen, sent, received).quiet()


def test_the_whole_text_is_known_after_a_resume() -> None:
    assert judge_of_the_second(SEEN, [resume(1)], [resumed(1), token(1, 4, "ello"), DONE]).texts == {"g": "hello"}


def test_the_whole_text_is_known_though_a_connection_between_went_back_and_heard_little() -> None:
    resumable: Resumable = {}
    judge([R], SEEN, resumable)
    judge([resume(1)], [resumed(1)], resumable)
    assert judge([resume(3)], [resumed(3), token(3, 2, "lo"), DONE], resumable).texts == {"g": "hello"}


def test_the_judge_remembers_a_text_that_only_another_connection_heard() -> None:
    resumable: Resumable = {}
    judge([R], SEEN, resumable)
    judge([resume(1)], [resumed(1)], resumable)
    with pytest.raises(AssertionError, match="another text"):
        judge([resume(0)], [resumed(0), token(0, 4, "hull")], resumable)


def test_a_cancel_on_the_connection_that_is_gone_may_end_it_on_the_next() -> None:
    resumable: Resumable = {}
    judge([R, CANCEL], SEEN, resumable)
    judge([resume(3)], [resumed(3), CANCELLED], resumable).quiet()


def test_a_cancel_known_to_be_read_before_the_connection_went_lets_only_the_end_through() -> None:
    resumable: Resumable = {}
    judge([R, CANCEL, ASK], [*SEEN, status("g")], resumable)
    with pytest.raises(AssertionError, match="had been read"):
        judge([resume(3)], [resumed(3), token(3)], resumable)


@pytest.mark.parametrize(
    ("sent", "received", "objection"),
    [
        (G, [BEGUN], "unasked for"),
        (R, [STARTED], "in vain"),
        (G, [STARTED, DETACHED], "nobody could resume"),
        (R, [DETACHED], "detached after nothing"),
        (R, [*SEEN, DETACHED, token(3)], "not open"),
        (R, [*SEEN, DETACHED, DONE], "not open"),
    ],
)
def test_the_judge_objects_to_every_broken_rule_on_the_first_connection(
    sent: dict[str, Any], received: list[dict[str, Any]], objection: str
) -> None:
    with pytest.raises(AssertionError, match=objection):
        judge([sent], received)


def test_what_was_detached_is_not_open_any_more() -> None:
    judge([R], [*SEEN, DETACHED]).quiet()
    judge([R, ASK], [*SEEN, DETACHED, status()]).quiet()
    judge([R, CANCEL], [*SEEN, DETACHED, error("not_active", id="g")]).quiet()


def test_the_judge_misses_an_answer_to_a_resume() -> None:
    with pytest.raises(AssertionError, match="without an end"):
        judge([resume()], []).quiet()
