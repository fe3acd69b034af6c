"""Rows about our server alone: what its engine and transport cost, cancels, stalled readers."""

import asyncio
import socket
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from statistics import mean

from websockets.asyncio.client import connect

from bench import measure
from bench.load import Request, closed_loop, prompts, requests
from bench.measure import Trace
from bench.runs import Measurement, Plan, Variant, alternate, closed
from bench.sides import ECHO, METER, SIDES, metered, paced_echo
from bench.sides.metered import model_seconds
from bench.sides.process import SideFailed
from bench.sides.side import Side
from bench.sides.websocket import Client, WebSocketSide
from bench.table import Row, compared, single

TICK = 5.0  # milliseconds of a paced step
HEALTHY = 8  # streams beside the stalled reader
STALLED = 4  # generations on the stalled reader's connection


async def overhead(plan: Plan) -> list[Row]:
    """Measure the mean time between two tokens of a stream, while all streams decode, against a loop that calls the runner.

    How prompts and running streams share the steps before is the scheduler's choice, and shows in other rows.
    """
    rows = []
    for streams in (1, 16):
        asked = requests(streams, [plan.pick(64, 12)], lengths=(16,))
        setting = plan.setting(streams=streams)
        sides = {
            name: Variant(partial(SIDES[name], setting), closed(streams, asked), streams) for name in ("wsserver", "loop")
        }
        runs = await alternate(sides, plan.rounds)
        gaps = [runs.each(name, lambda traces: 1000 * mean(measure.steady_itls(traces))) for name in sides]
        if not all(gaps):
            rows.append(Row(f"overhead.{streams}", note=runs.why_not(*sides)))
            continue
        shares = [ours / theirs - 1 for ours, theirs in zip(*gaps, strict=False)]
        note = f"{measure.quantile(gaps[0], 0.5):.1f} and {measure.quantile(gaps[1], 0.5):.1f} ms from token to token"
        rows.append(single(f"overhead.{streams}", shares, note=note))
    return rows


async def server_cpu(plan: Plan) -> list[Row]:
    """Measure our process's CPU time per token, the model's own taken off."""
    rows = []
    for streams in (1, 16):
        asked = requests(streams, [plan.pick(400, 24)], lengths=(16,))
        side = partial(metered, plan.setting(streams=streams))
        runs = await alternate({"metered": Variant(side, partial(_cpu_per_token, streams, asked), streams)}, plan.rounds)
        found = runs.each("metered", lambda seconds: 1000 * seconds)
        note = "all CPU time of the process but that of the runner's steps"
        name = f"server_cpu.{streams}"
        rows.append(single(name, found, note=note) if found else Row(name, note=runs.why_not("metered")))
    return rows


async def echo_frames(plan: Plan) -> list[Row]:
    """Measure the tokens that a CPU second sends, of the echo model at full speed and of a loop that only sends.

    A frame of the loop is one token. Ours may hold several: tokens are counted on both sides, frames are told beside them.
    """
    asked = requests(16, [plan.pick(12000, 1000)])
    setting = plan.setting(16, "auto", ECHO)
    load = partial(_tokens_and_frames_per_cpu_second, asked)
    sides = {name: Variant(partial(SIDES[name], setting), load, 16) for name in ("wsserver", "null_websocket")}
    runs = await alternate(sides, plan.rounds)
    ours, theirs = (runs.each(name, lambda found: found[0]) for name in sides)
    if not ours or not theirs:
        return [Row("echo_frames", note=runs.why_not(*sides))]
    frames = [measure.quantile(runs.each(name, lambda found: found[1]), 0.5) for name in sides]
    note = f"in {frames[0]:.0f} and {frames[1]:.0f} frames; 16 clients"
    return [compared("echo_frames", ours, theirs, note=note)]


async def cancel(plan: Plan) -> list[Row]:
    """Measure the first token of a request sent right behind a cancel of the only slot's stream, and of one alone."""
    side = partial(SIDES["wsserver"], plan.setting(streams=1))
    texts = prompts(3 * plan.pick(6, 2), lengths=(16,), seed=7)
    runs = await alternate({"wsserver": Variant(side, partial(after_cancels, texts))}, plan.rounds)
    if not (found := runs.found.get("wsserver")):
        return [Row("cancel", note=runs.why_not("wsserver"))]
    steps = [(after - idle) / step for after, idle, step in found]
    after, idle, step = (1000 * part for part in found[0])
    note = f"{after:.0f} after a cancel, {idle:.0f} without, a step is {step:.0f} ms"
    return [single("cancel", steps, note=note)]


async def stalled_reader(plan: Plan) -> list[Row]:
    """Measure the gaps of streams beside a reader that stops to read, and beside the same one when it reads."""
    setting = plan.setting(HEALTHY + STALLED, "auto", ECHO)
    side = partial(paced_echo, setting, TICK)
    tokens = plan.pick(3000, 800)
    variants = {
        "stalled": Variant(side, partial(_gaps_beside, tokens, False), HEALTHY),
        "reading": Variant(side, partial(_gaps_beside, tokens, True), HEALTHY),
    }
    runs = await alternate(variants, plan.rounds)
    ours, theirs = (runs.each(name, lambda found: 1000 * found) for name in variants)
    if not ours or not theirs:
        return [Row("stalled_reader", note=runs.why_not(*variants))]
    note = f"echo model, a step every {TICK:.0f} ms, {HEALTHY} streams"
    return [compared("stalled_reader", ours, theirs, note=note)]


async def _cpu_per_token(streams: int, asked: list[Request], side: Side) -> float:
    def seconds() -> float:
        return side.process.cpu_seconds() - model_seconds(METER)

    before = seconds()
    traces = await closed_loop(side.stream, streams, asked)
    return (seconds() - before) / sum(t.completion_tokens for t in traces)


async def _tokens_and_frames_per_cpu_second(asked: list[Request], side: Side) -> tuple[float, float]:
    before = side.process.cpu_seconds()
    traces = await closed_loop(side.stream, len(asked), asked)
    seconds = side.process.cpu_seconds() - before
    counts = (sum(t.completion_tokens for t in traces), sum(len(t.arrivals) for t in traces))
    return counts[0] / seconds, counts[1] / seconds


async def after_cancels(texts: Sequence[str], side: Side) -> tuple[float, float, float]:
    """Give the median first token after a cancel, without one, and the median step, in seconds; a trial takes 3 texts."""
    assert isinstance(side, WebSocketSide)
    client, other = await Client.connect(side.url), await Client.connect(side.url)
    after, idle, steps = [], [], []
    for alone, long, behind in zip(*(texts[i::3] for i in range(3)), strict=True):
        idle.append((await client.stream(Request(alone, 2))).ttft)
        arrivals, sent = await _cancel_midway(client, other, Request(long, 1000), Request(behind, 2))
        after.append((await other.answer(sent))[0].ttft)
        steps += [b - a for a, b in pairwise(arrivals)]
    return measure.quantile(after, 0.5), measure.quantile(idle, 0.5), measure.quantile(steps, 0.5)


async def _cancel_midway(client: Client, other: Client, long: Request, short: Request) -> tuple[list[float], float]:
    """Cancel a stream after ten frames and send the next request right behind; give its arrivals and when that was sent."""
    await client.generate(long)
    arrivals: list[float] = []
    sent = 0.0
    async for now, frame in client.frames():
        if frame["type"] == "token":
            arrivals.append(now)
        if len(arrivals) == 10 and not sent:
            await client.send(type="cancel", id="g")
            sent = await other.generate(short)
        if frame["type"] == "done" and frame["finish_reason"] != "cancelled":
            raise SideFailed(f"the stream ended with {frame['finish_reason']} before its cancel")
    return arrivals, sent


async def _gaps_beside(tokens: int, reads: bool, side: Side) -> float:
    """Give the p99 gap, in seconds, of the last half of healthy streams that run beside a reader which reads or does not."""
    assert isinstance(side, WebSocketSide)
    # A small window, so that it is full after a few hundred frames.
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.connect(("127.0.0.1", int(side.url.rpartition(":")[2].partition("/")[0])))
    reader = Client(await connect(side.url, sock=narrow, compression=None, max_queue=4, ping_interval=None))
    for index, prompt in enumerate(prompts(STALLED, seed=5)):
        fields = {"id": f"s{index}", "ignore_eos": True, "max_tokens": 4 * tokens}
        await reader.send(type="generate", prompt=prompt, **fields)
    reading = asyncio.create_task(_read_on(reader)) if reads else None
    traces = await closed_loop(side.stream, HEALTHY, requests(HEALTHY, [tokens], seed=6))
    if reading:
        reading.cancel()
    else:
        await _check_that_it_stalled(reader)
    reader.socket.transport.abort()
    return measure.quantile(_later_gaps(traces), 0.99)


async def _check_that_it_stalled(client: Client) -> None:
    """Read until a frame that holds several tokens: only unread tokens merge."""
    try:
        async with asyncio.timeout(10):
            async for _, frame in client.frames():
                if frame.get("n", 0) > 1:
                    return
    except TimeoutError:
        raise SideFailed("the stalled reader was never behind; the row says nothing") from None
    raise SideFailed("the stalled reader's generations ended before it was behind; the row says nothing")


async def _read_on(client: Client) -> None:
    while True:
        await client.socket.recv(decode=False)


def _later_gaps(traces: Sequence[Trace]) -> list[float]:
    # The first half is what it takes until the stalled reader's buffers are full.
    return [gap for trace in traces for gap in trace.itls[len(trace.itls) // 2 :]]


ROWS: dict[str, Measurement] = {
    "overhead": overhead,
    "server_cpu": server_cpu,
    "echo_frames": echo_frames,
    "cancel": cancel,
    "stalled_reader": stalled_reader,
}
