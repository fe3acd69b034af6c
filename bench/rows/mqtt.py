"""Rows about MQTT beside the WebSocket: how much later a first token comes, and what streams there do to those here."""

import asyncio
from functools import partial

from bench import measure
from bench.load import Request, closed_loop, requests
from bench.measure import Trace
from bench.runs import Measurement, Plan, Variant, alternate
from bench.sides import ECHO
from bench.sides.mqtt import MqttSide
from bench.sides.process import Process, SideFailed
from bench.sides.side import Side
from bench.table import Row, compared, single

STREAMS = 50
FIRST_TOKEN_TICK, STREAM_TICK = 5.0, 20.0  # milliseconds of a paced step


async def mqtt(plan: Plan) -> list[Row]:
    """Measure both."""
    return [await _first_token(plan), await _beside(plan)]


async def _first_token(plan: Plan) -> Row:
    asked = requests(2 * plan.pick(200, 20), [4], lengths=(16,))
    side = partial(MqttSide, plan.setting(1, "auto", ECHO), FIRST_TOKEN_TICK)
    runs = await alternate({"mqtt": Variant(side, partial(_lateness, asked))}, plan.rounds)
    if not (found := runs.found.get("mqtt")):
        return Row("mqtt.first_token", note=runs.why_not("mqtt"))
    note = f"{found[0][0]:.1f} over a WebSocket, {found[0][1]:.1f} ms over MQTT; a step every {FIRST_TOKEN_TICK:.0f} ms"
    return single("mqtt.first_token", [over - under for under, over in found], note=note)


async def _beside(plan: Plan) -> Row:
    tokens = plan.pick(1000, 200)
    side = partial(MqttSide, plan.setting(2 * STREAMS, "auto", ECHO), STREAM_TICK)
    variants = {
        "beside MQTT": Variant(side, partial(_gap, tokens, True)),
        "beside WebSockets": Variant(side, partial(_gap, tokens, False)),
    }
    runs = await alternate(variants, plan.rounds)
    ours, theirs = (runs.each(name, lambda seconds: 1000 * seconds) for name in variants)
    if not ours or not theirs:
        return Row("mqtt.gap", note=runs.why_not(*variants))
    note = f"echo model, a step every {STREAM_TICK:.0f} ms; {STREAMS} and {STREAMS} streams, no token lost"
    return compared("mqtt.gap", ours, theirs, note=note)


async def _lateness(asked: list[Request], side: Side) -> tuple[float, float]:
    """Give the median first token over a WebSocket and over MQTT, in milliseconds; requests take turns."""
    assert isinstance(side, MqttSide)
    traces: tuple[list[Trace], list[Trace]] = ([], [])
    for number, request in enumerate(asked):
        stream = side.stream_mqtt if number % 2 else side.stream
        traces[number % 2].append(await stream(request))
    return 1000 * measure.ttft(traces[0]), 1000 * measure.ttft(traces[1])


async def _gap(tokens: int, over_mqtt: bool, side: Side) -> float:
    """Give the p99 gap, in seconds, of WebSocket streams beside as many others that another process reads."""
    assert isinstance(side, MqttSide)
    how = ("mqtt", str(side.port)) if over_mqtt else ("websocket", side.url)
    others = await Process.spawn("others", "bench.sides.beside", *how, str(STREAMS), str(tokens), threads=1)
    traces, found = await asyncio.gather(
        closed_loop(side.stream, STREAMS, requests(STREAMS, [tokens], lengths=(16,))), others.wait_for(r"got (\d+) tokens")
    )
    await others.stop()
    if int(found[1]) < STREAMS * tokens:
        raise SideFailed(f"only {found[1]} tokens came beside")
    return measure.quantile(measure.steady_itls(traces), 0.99)


ROWS: dict[str, Measurement] = {"mqtt": mqtt}
