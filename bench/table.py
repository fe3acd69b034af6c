"""Rows to text, Markdown and JSON, and the file that keeps them. Pure but for that file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measure import Spread, ratio, spread
from bench.targets import TARGETS, Target

HEADER = ("row", "what", "wsserver", "other", "value", "must", "stretch", "reached", "of the floor", "notes")


@dataclass(frozen=True, slots=True)
class Row:
    """One line: our figure, the other side's if there is one, and the value that the target is about."""

    name: str
    ours: Spread | None = None
    theirs: Spread | None = None
    value: Spread | None = None
    floor_share: float | None = None
    note: str = ""

    @property
    def target(self) -> Target:
        """What it is to reach."""
        return TARGETS[self.name]

    @property
    def verdict(self) -> str:
        """Which mark it reaches; a row without a value says so."""
        return self.target.verdict(self.value.median) if self.value else "not measured"


def single(name: str, ours: Sequence[float], **details: Any) -> Row:
    """Make a row whose value is our own figure."""
    return Row(name, value=spread(ours), **details)


def compared(name: str, ours: Sequence[float], theirs: Sequence[float], **details: Any) -> Row:
    """Make a row whose value is our figure over theirs."""
    return Row(name, spread(ours), spread(theirs), ratio(ours, theirs), **details)


def text(rows: Iterable[Row]) -> str:
    """Give the table, as Markdown whose columns stand under each other."""
    lines = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([shown[0], rule, *shown[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    target, sign = row.target, "<= " if row.target.at_most else ">= "
    marks = [f"{sign}{mark:g}" if mark is not None else "" for mark in (target.must, target.stretch)]
    ours, theirs = (_spread(s, target.unit) for s in (row.ours, row.theirs))
    value = _spread(row.value, "x" if row.theirs else target.unit)
    floor = f"{row.floor_share:.0%}" if row.floor_share is not None else ""
    return (row.name, target.what, ours, theirs, value, *marks, row.verdict, floor, row.note)


def _spread(found: Spread | None, unit: str) -> str:
    if found is None:
        return ""
    low, high = _number(found.low), _number(found.high)
    return f"{_number(found.median)} {unit}" + (f" ({low} to {high})" if low != high else "")


def _number(value: float) -> str:
    """Give three figures, and all those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_json(row: Row) -> dict[str, Any]:
    """Give a row as plain values, with its target."""
    return {**asdict(row), "target": asdict(row.target), "reached": row.verdict}


def from_json(stored: dict[str, Any]) -> Row:
    """Read a row back."""
    spreads = {key: Spread(*stored[key]) if stored[key] else None for key in ("ours", "theirs", "value")}
    return Row(stored["name"], floor_share=stored["floor_share"], note=stored["note"], **spreads)


@dataclass(frozen=True, slots=True)
class Run:
    """The rows of one call of the command, and what they were measured on."""

    machine: str
    date: str
    command: str
    conditions: str
    rows: tuple[Row, ...]

    def shown(self) -> str:
        """Give it as printed."""
        return f"{self.machine}\n{self.date}; {self.conditions}\n`{self.command}`\n\n{text(self.rows)}\n"


class Results:
    """All runs that are kept, in a JSON file and a Markdown file beside it. A row measured anew replaces the old one."""

    def __init__(self, folder: Path) -> None:
        self._json = folder / "RESULTS.json"
        self._markdown = folder / "RESULTS.md"

    def read(self) -> list[Run]:
        """Give the runs on file, whose rows may since be gone from the targets: those are left out."""
        if not self._json.exists():
            return []
        runs = json.loads(self._json.read_text())
        rows = [tuple(from_json(row) for row in run.pop("rows") if row["name"] in TARGETS) for run in runs]
        return [Run(**run, rows=kept) for run, kept in zip(runs, rows, strict=True)]

    def add(self, run: Run) -> None:
        """Keep a run, and of the older ones what it did not measure; rows that could not be measured replace nothing."""
        measured = {row.name for row in run.rows if row.value}
        older = [
            Run(o.machine, o.date, o.command, o.conditions, tuple(r for r in o.rows if r.name not in measured))
            for o in self.read()
        ]
        known = {row.name for o in older for row in o.rows if row.value}
        kept = tuple(row for row in run.rows if row.value or row.name not in known)
        newest = Run(run.machine, run.date, run.command, run.conditions, kept)
        runs = [r for r in (newest, *older) if any(row.value for row in r.rows) or r is newest]
        stored = [{**asdict(r), "rows": [as_json(row) for row in r.rows]} for r in runs]
        self._json.write_text(json.dumps(stored, indent=1) + "\n")
        self._markdown.write_text("\n".join(["# Results\n", PREAMBLE, *(r.shown() for r in runs)]))


PREAMBLE = """\
Written by `make bench`; see `bench/__init__.py`. Each cell is the median of fresh processes, alternated A B B A, and the
extremes. "value" is wsserver's figure over the other's, or its own where there is no other. "of the floor" is the rate over
what the measured memory bandwidth would allow. Rates count the server's own `usage`; TTFT, ITL and TPOT are vLLM's.
"""
