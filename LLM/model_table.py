"""The models there are as a table of plain text, for a terminal or a pipe: what each takes, and whether that fits.

It is read off the folders; nothing is loaded. Knows no server.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from LLM import model_folder
from LLM._base_model_handler import LoadOptions, Plan
from LLM.errors import Refused
from LLM.listing import Listed
from LLM.room import SHARE, leaving

log = logging.getLogger(__name__)

UNREADABLE = "its folder cannot be read; the log says why"
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class Row:
    """What is told of a model; a dash is what it has not, or what could not be found out."""

    model: str
    also: str = "-"
    family: str = "-"
    parameters: str = "-"
    disk: str = "-"
    precision: str = "-"
    weights: str = "-"
    kv_cache: str = "-"
    fits: str = "yes"


HEADINGS = Row("MODEL", "ALSO", "FAMILY", "PARAMETERS", "DISK", "PRECISION", "WEIGHTS", "KV-CACHE", "FITS")
NUMBERS = (3, 4, 6, 7)  # the columns that stand to the right


def table(listing: Mapping[str, Listed], options: LoadOptions, memory: int | None) -> str:
    """Write the table of a listing's models, each as it would be loaded by `options`; `memory` is that of `leaving`."""
    models = {listed.id: listed for listed in listing.values()}
    names = {id: sorted(name for name in listing if listing[name].id == id != name) for id in models}
    found = [_row(models[id], names[id], options, memory) for id in sorted(models)]
    lines = _aligned([HEADINGS, *(row for row, _ in found)])
    plans = [plan for _, plan in found if plan and plan.device_bytes]
    return "\n".join([*lines, *(_about(plans[0], memory) if plans else ())])


def _row(listed: Listed, names: Sequence[str], options: LoadOptions, memory: int | None) -> tuple[Row, Plan | None]:
    """Give a model's row, and how it would be loaded if it can be."""
    row, plan = Row(listed.id, ",".join(names) or "-"), None
    try:
        if listed.problem:
            raise Refused("load_failed", listed.problem)
        handler = listed.handler()
        if handler.model_ids:
            return row, None  # it has no folder, and takes nothing
        found = model_folder.read(listed.folder)
        row = replace(row, family=found.family, parameters=_count(found.parameters), disk=_size(found.file_bytes))
        # Only here: the first plan imports torch, for what the machine can do.
        plan = handler.plan(listed.folder, options)
        row = _planned(row, plan, handler.plan(listed.folder, replace(options, kv_memory=0)).memory_bytes)
        leaving(plan, (), memory)
    except Refused as refused:
        row = replace(row, fits=f"no: {refused.message}")
    except Exception:  # whatever a folder or a drop-in makes of it: the other models are told all the same
        log.exception("the folder of %s cannot be read", listed.id)
        row = replace(row, fits=f"no: {UNREADABLE}")
    return row, plan


def _planned(row: Row, plan: Plan, weights: int) -> Row:
    how = plan.options
    precision = how.dtype if how.quantization == "none" else how.quantization
    # Without a word of the operator's, a cache on a GPU takes what is left in the end.
    more = "+" if how.kv_memory is None and how.device != "cpu" else ""
    return replace(row, precision=precision, weights=_size(weights), kv_cache=_size(plan.memory_bytes - weights) + more)


def _about(plan: Plan, memory: int | None) -> Sequence[str]:
    device, budget = plan.options.device, int(plan.device_bytes * SHARE) if memory is None else memory
    return "", f"Models may take {_size(budget)} together on {device}, weights and KV caches (--memory, --kv-memory)."


def _aligned(rows: Sequence[Row]) -> list[str]:
    columns = list(zip(*map(astuple, rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if place in NUMBERS else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(astuple(row), widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _size(size: int) -> str:
    # Written as the options take it.
    unit = "GiB" if size >= UNITS["GiB"] else "MiB" if size >= UNITS["MiB"] else "KiB"
    return f"{size / UNITS[unit]:.1f}{unit}"


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{name}"
    return str(parameters)
