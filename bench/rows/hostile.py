"""The row about clients that mean harm: what those who do not mean any notice of them."""

import json
from functools import partial

from bench import measure
from bench.hostile import ATTACKS
from bench.load import closed_loop, requests
from bench.runs import Measurement, Plan, Variant, alternate
from bench.sides import ECHO, paced_echo
from bench.sides.process import Process, SideFailed
from bench.sides.side import Side
from bench.sides.websocket import WebSocketSide
from bench.table import Row, compared

TICK = 20.0  # milliseconds of a paced step
HEALTHY = 8  # streams of those who mean no harm


async def hostile_clients(plan: Plan) -> list[Row]:
    """Measure the gaps of streams while every attack there is goes on, and of the same streams in peace."""
    # No limits but those that every server has.
    side = partial(paced_echo, plan.setting(2 * HEALTHY, "auto", ECHO), TICK, {})
    tokens = plan.pick(1500, 250)
    names = list(ATTACKS)
    variants = {
        "attacked": Variant(side, partial(gaps, tokens, names), HEALTHY),
        "in peace": Variant(side, partial(gaps, tokens, []), HEALTHY),
    }
    runs = await alternate(variants, plan.rounds)
    ours, theirs = (runs.each(name, lambda found: 1000 * found) for name in variants)
    if not ours or not theirs:
        return [Row("hostile_clients", note=runs.why_not(*variants))]
    note = f"echo model, a step every {TICK:.0f} ms, {HEALTHY} streams; {', '.join(names)}"
    return [compared("hostile_clients", ours, theirs, note=note)]


async def gaps(tokens: int, attacks: list[str], side: Side) -> float:
    """Give the p99 gap, in seconds, of streams beside some attacks."""
    assert isinstance(side, WebSocketSide)
    said: list[str] = []
    if attacks:
        # They begin before the streams do, and end with them.
        seconds = f"{1.05 * tokens * TICK / 1000:.0f}"
        address = side.url.split("/")[2]
        attacker = await Process.spawn(
            "attackers", "bench.hostile", address, seconds, *attacks, threads=1, on_line=said.append
        )
        await attacker.wait_for("attacking")
    traces = await closed_loop(side.stream, HEALTHY, requests(HEALTHY, [tokens], seed=6))
    if attacks:
        await attacker.ended()
        await attacker.stop()
        _check_that_it_was_attacked(said)
    return measure.quantile([gap for trace in traces for gap in trace.itls], 0.99)


def _check_that_it_was_attacked(said: list[str]) -> None:
    if not said or not all(json.loads(said[-1]).values()):
        raise SideFailed(f"there was no attack: {said}")


ROWS: dict[str, Measurement] = {"hostile_clients": hostile_clients}
