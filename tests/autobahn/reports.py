"""What two servers did in the same cases, as the testsuite's index.json tells it: counted, and compared. Pure."""

from collections import Counter
from collections.abc import Mapping

# A case's verdict, for what was answered and for how the connection was closed.
Report = Mapping[str, Mapping[str, object]]

# Autobahn's words for what breaks no rule of RFC 6455: a rule it leaves open, or one that was met late.
ACCEPTABLE = {"OK", "NON-STRICT", "INFORMATIONAL"}


def summary(report: Report) -> str:
    """Give one line: how many cases of each behaviour, the most frequent one first."""
    counted = Counter(behaviour for behaviour, _ in map(_verdict, report.values())).most_common()
    return f"{len(report)} cases: " + ", ".join(f"{count} {behaviour}" for behaviour, count in counted)


def failures(report: Report) -> list[str]:
    """Give the cases that went wrong, each with its verdict."""
    return [_told(case, report) for case in report if not _acceptable(case, report)]


def worse(ours: Report, bare: Report) -> list[str]:
    """Give the cases that went wrong with us and not with the bare library, and those that were not run with us."""
    missing = [f"{case}: not run" for case in bare if case not in ours]
    ours_alone = [case for case in ours if case not in bare or _acceptable(case, bare)]
    return missing + [_told(case, ours) for case in ours_alone if not _acceptable(case, ours)]


def _acceptable(case: str, report: Report) -> bool:
    return ACCEPTABLE.issuperset(_verdict(report[case]))


def _told(case: str, report: Report) -> str:
    return f"{case}: {', closing '.join(_verdict(report[case]))}"


def _verdict(entry: Mapping[str, object]) -> tuple[str, str]:
    return str(entry["behavior"]), str(entry["behaviorClose"])
