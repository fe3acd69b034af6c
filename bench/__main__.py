"""The command: `python -m bench [--rows name,name] [--quick]` measures, prints one table, and writes it as JSON beside."""

import argparse
import asyncio
import json
import os
import sys
from dataclasses import replace

import uvloop

from bench import machine
from bench.machine import DTYPE_BYTES
from bench.rows import MEASUREMENTS
from bench.runs import Plan
from bench.sides.process import CACHE, ROOT
from bench.table import Results, Row, Run, as_json

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROUNDS = 4


def main() -> None:
    """Run the command line."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.quick and arguments.write_results:
        parser.error("--quick shows whether the bench runs; its figures are not worth keeping")
    date = machine.now()
    bandwidth, way = machine.read_rate(arguments.threads, "cpu")
    conditions = f"{arguments.threads} compute threads a side, {arguments.dtype}, reads {bandwidth / 1e9:.1f} GB/s ({way})"
    rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
    plan = Plan(arguments.model, arguments.threads, rounds, arguments.quick, bandwidth, arguments.dtype)
    plan = replace(plan, decode=arguments.decode)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = runner.run(_measure(plan, arguments.rows))
    command = " ".join(["python -m bench", *sys.argv[1:]])
    run = Run(machine.describe(), date, command, conditions, tuple(rows))
    print(run.shown())
    CACHE.mkdir(exist_ok=True)
    (CACHE / "last.json").write_text(json.dumps([as_json(row) for row in rows], indent=1))
    if arguments.write_results:
        Results(ROOT / "bench").add(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures wsserver beside its peers.")
    parser.add_argument("--rows", type=_names, default=list(MEASUREMENTS), help=f"some of: {', '.join(MEASUREMENTS)}")
    parser.add_argument("--quick", action="store_true", help="little work, one round: whether it runs, not how fast")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"measure each side so often (default: {ROUNDS}, quick: 1)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a model folder under LLM/ (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="float32", help="of rows that do not name one")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="compute threads a side")
    parser.add_argument("--decode", choices=("eager", "graph", "compiled"), default="eager", help="how our server decodes")
    parser.add_argument("--write-results", action="store_true", help="keep the table in bench/RESULTS.md and RESULTS.json")
    return parser


async def _measure(plan: Plan, names: list[str]) -> list[Row]:
    rows = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        rows += await MEASUREMENTS[name](plan)
    return rows


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(MEASUREMENTS):
        raise argparse.ArgumentTypeError(f"no such rows: {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    main()
