"""Rows that set our server beside its peers: one stream, 16 clients, Poisson arrivals; and a check of the bench itself."""

from collections.abc import Awaitable, Callable
from functools import partial

from bench import measure
from bench.load import Request, poisson, requests
from bench.machine import step_bytes
from bench.measure import Trace
from bench.runs import Measurement, Plan, Runs, Variant, alternate, closed
from bench.sides import SIDES
from bench.sides.side import Side
from bench.table import Row, compared, single

CLIENTS = 16
Load = Callable[[Side], Awaitable[list[Trace]]]
Value = Callable[[list[Trace]], float]


async def one_stream(plan: Plan, dtype: str, name: str) -> list[Row]:
    """Measure one request at a time, at one precision: eager beside generate, compiled beside llama.cpp, which is so too."""
    asked = requests(plan.pick(3, 1), [plan.pick(96, 24)], lengths=(16,))
    runs = await _beside(plan, dtype, 1, ("wsserver", "compiled", "generate", "llama"), closed(1, asked))
    rows = []
    for row, side, peer in (
        ("generate", "wsserver", "generate"),
        ("llama", "compiled", "llama"),
        ("llama_eager", "wsserver", "llama"),
    ):
        floor = _floor_share(plan, dtype, runs, 1, side)
        rows.append(_row(f"{name}.{row}", runs, peer, measure.tokens_per_second, floor, ours=side))
    if not (ours := runs.found.get("compiled")):
        return [*rows, Row(f"{name}.bandwidth", note=runs.why_not("compiled"))]
    rates = [1 / measure.tpot(traces) for traces in ours]
    step = step_bytes(plan.setting().folder, dtype, 1, _context(ours[0]))
    note = f"{rates[0]:.1f} tok/s after the first, {step / 1e6:.0f} MB a step, {plan.bandwidth / 1e9:.1f} GB/s"
    shares = [rate * step / plan.bandwidth for rate in rates]
    return [*rows, single(f"{name}.bandwidth", shares, floor_share=shares[0], note=note)]


async def clients_16(plan: Plan) -> list[Row]:
    """Measure 16 clients that ask again as soon as they are answered."""
    asked = requests(plan.pick(2, 1) * CLIENTS, plan.pick([32, 48, 64, 40], [8, 12, 16, 10]))
    peers = ("serve", "serve_cb", "cb")
    runs = await _beside(plan, plan.dtype, CLIENTS, ("wsserver", *peers), closed(CLIENTS, asked))
    floor = _floor_share(plan, plan.dtype, runs, CLIENTS)
    rows = [_row(f"clients_16.{peer}", runs, peer, measure.tokens_per_second, floor) for peer in peers]
    for peer, suffix in (("cb", ""), ("serve_cb", "_serve_cb")):
        rows += [_row(f"clients_16.itl{suffix}", runs, peer, _itl_ms, note=_tails(runs, peer))]
        rows += [_row(f"clients_16.ttft{suffix}", runs, peer, _ttft_ms)]
    return rows


async def poisson_arrivals(plan: Plan) -> list[Row]:
    """Measure requests that come when they come, at a rate that both sides can serve."""
    asked = requests(plan.pick(24, 4), [32])
    load = partial(_poisson, 0.4, asked)
    runs = await _beside(plan, plan.dtype, CLIENTS, ("wsserver", "serve_cb"), load)
    note = f"0.4 requests a second; {_tails(runs, 'serve_cb')}"
    return [
        _row("poisson.itl", runs, "serve_cb", _itl_ms, note=note),
        _row("poisson.ttft", runs, "serve_cb", _ttft_ms),
    ]


async def client(plan: Plan) -> list[Row]:
    """Show that the bench's clients are not what is measured: how many tokens a second they read when nothing makes them."""
    many = requests(CLIENTS, [plan.pick(2000, 500)])
    few = requests(CLIENTS, [plan.pick(48, 8)])
    setting = plan.setting(streams=CLIENTS)
    variants = {
        "wsserver": Variant(partial(SIDES["wsserver"], setting), closed(CLIENTS, few), CLIENTS),
        "null_websocket": Variant(partial(SIDES["null_websocket"], setting), closed(CLIENTS, many)),
        "null_http": Variant(partial(SIDES["null_http"], setting), closed(CLIENTS, many)),
    }
    runs = await alternate(variants, plan.rounds)
    rate = measure.tokens_per_second
    return [_row(f"client.{kind}", runs, "wsserver", rate, ours=f"null_{kind}") for kind in ("websocket", "http")]


async def _beside(plan: Plan, dtype: str, streams: int, names: tuple[str, ...], load: Load) -> Runs[list[Trace]]:
    setting = plan.setting(streams, dtype)
    return await alternate({name: Variant(partial(SIDES[name], setting), load, streams) for name in names}, plan.rounds)


async def _poisson(rate: float, asked: list[Request], side: Side) -> list[Trace]:
    return await poisson(side.stream, rate, asked)


def _row(
    name: str,
    runs: Runs[list[Trace]],
    peer: str,
    value: Value,
    floor: float | None = None,
    note: str = "",
    ours: str = "wsserver",
) -> Row:
    """Make a row of one value of ours over a peer's; one that lacks a side says why."""
    mine, theirs = runs.each(ours, value), runs.each(peer, value)
    if not mine or not theirs:
        return Row(name, note=runs.why_not(ours, peer))
    uneven = _prompt_tokens(runs, ours) != _prompt_tokens(runs, peer) and "null" not in ours
    notes = [note, "the prompts were not the same tokens" if uneven else ""]
    return compared(name, mine, theirs, floor_share=floor, note="; ".join(filter(None, notes)))


def _prompt_tokens(runs: Runs[list[Trace]], name: str) -> list[int]:
    """Give what a side counted: the same text must be the same tokens everywhere, or the sides do unequal work."""
    return sorted(trace.prompt_tokens for trace in runs.found[name][0])


def _floor_share(plan: Plan, dtype: str, runs: Runs[list[Trace]], streams: int, ours: str = "wsserver") -> float | None:
    """Give our rate over the rate at which the memory could feed so many streams."""
    if not (found := runs.found.get(ours)):
        return None
    step = step_bytes(plan.setting().folder, dtype, streams, _context(found[0]))
    floor = plan.bandwidth / step * streams
    return measure.quantile(runs.each(ours, measure.tokens_per_second), 0.5) / floor


def _context(traces: list[Trace]) -> int:
    """Give the mean length of the streams while they decode."""
    return round(sum(t.prompt_tokens + t.completion_tokens / 2 for t in traces) / len(traces))


def _itl_ms(traces: list[Trace]) -> float:
    return 1000 * measure.itl(traces)


def _ttft_ms(traces: list[Trace]) -> float:
    return 1000 * measure.ttft(traces)


def _tails(runs: Runs[list[Trace]], peer: str) -> str:
    """Say what a median leaves out."""
    if "wsserver" not in runs.found or peer not in runs.found:
        return ""
    both = (runs.found["wsserver"][0], runs.found[peer][0])
    p99 = " and ".join(f"{1000 * measure.itl(traces, 0.99):.0f}" for traces in both)
    tpot = " and ".join(f"{1000 * measure.tpot(traces):.0f}" for traces in both)
    return f"ITL p99 {p99} ms, TPOT {tpot} ms"


ROWS: dict[str, Measurement] = {
    "one_stream_f32": partial(one_stream, dtype="float32", name="one_stream_f32"),
    "one_stream_bf16": partial(one_stream, dtype="bfloat16", name="one_stream_bf16"),
    "clients_16": clients_16,
    "poisson": poisson_arrivals,
    "client": client,
}
