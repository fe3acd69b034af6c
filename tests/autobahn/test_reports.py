import pytest

from tests.autobahn.reports import Report, failures, summary, worse


def report(**verdicts: str) -> Report:
    """Give a report from `c1="OK"`, or `c1="OK/UNCLEAN"` where the closing went another way."""
    pairs = {case: verdict.partition("/") for case, verdict in verdicts.items()}
    return {case: {"behavior": b, "behaviorClose": close or "OK", "duration": 1} for case, (b, _, close) in pairs.items()}


def test_a_summary_counts_cases_by_behaviour():
    found = report(a="OK", b="NON-STRICT", c="OK", d="FAILED")
    assert summary(found) == "4 cases: 2 OK, 1 NON-STRICT, 1 FAILED"


def test_a_case_fails_by_its_answer_or_by_its_closing():
    found = report(a="OK", b="FAILED", c="OK/UNCLEAN", d="NON-STRICT", e="INFORMATIONAL/INFORMATIONAL")
    assert failures(found) == ["b: FAILED, closing OK", "c: OK, closing UNCLEAN"]


@pytest.mark.parametrize(
    ("ours", "bare", "found"),
    [
        ("OK", "OK", []),
        ("FAILED", "FAILED", []),
        ("OK", "FAILED", []),
        ("NON-STRICT", "OK", []),
        ("FAILED", "OK", ["a: FAILED, closing OK"]),
        ("UNIMPLEMENTED", "OK", ["a: UNIMPLEMENTED, closing OK"]),
        ("OK/WRONG CODE", "OK", ["a: OK, closing WRONG CODE"]),
        ("FAILED", "NON-STRICT", ["a: FAILED, closing OK"]),
    ],
)
def test_only_what_the_bare_library_does_better_counts(ours: str, bare: str, found: list[str]):
    assert worse(report(a=ours), report(a=bare)) == found


def test_a_case_that_was_not_run_with_us_counts():
    assert worse(report(a="OK"), report(a="OK", b="OK")) == ["b: not run"]
    assert worse({}, report(a="FAILED")) == ["a: not run"]


def test_a_failure_in_a_case_that_only_we_ran_counts():
    assert worse(report(a="FAILED"), {}) == ["a: FAILED, closing OK"]
