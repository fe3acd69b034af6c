"""Rows about our engine: sampling of every kind, long prompts beside streams, chats that grow."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from bench import measure
from bench.load import Request, prompts, requests
from bench.measure import Trace
from bench.runs import Measurement, Plan, Variant, alternate, closed
from bench.sides import SIDES
from bench.sides.process import SideFailed
from bench.sides.side import Side
from bench.sides.websocket import Client, WebSocketSide
from bench.table import Row, compared

T = TypeVar("T")

CLIENTS = 16
# Every parameter of protocol.md, in mixtures that differ from request to request.
MIXTURES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_k": 40, "seed": 1, "stop": ["never said"], "logprobs": 3},
    {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "min_tokens": 4, "stop_token_ids": [0]},
    {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.1, "logit_bias": {"0": -100, "5": 1.5}},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "frequency_penalty": 0.7, "seed": 2, "logprobs": 0},
)
QUANTISED = ("int8", "nf4", "fp4")
TURNS = 10
QUESTIONS = ("What is a river?", "Tell me more.", "Why is that so?", "Give an example.", "And in winter?")


async def mixed_sampling(plan: Plan) -> list[Row]:
    """Measure 16 requests, each with another mixture of sampling parameters, against the same ones decoded greedily."""
    greedy = requests(CLIENTS, [plan.pick(64, 16)])
    # Token 0 ends an answer where stop_token_ids name it: a bias keeps it away, and all do equal work.
    mixed = [Request(r.prompt, r.max_tokens, _mixture(i)) for i, r in enumerate(greedy)]
    side = partial(SIDES["wsserver"], plan.setting(streams=CLIENTS))
    variants = {
        "mixed": Variant(side, closed(CLIENTS, mixed), CLIENTS),
        "greedy": Variant(side, closed(CLIENTS, greedy), CLIENTS),
    }
    runs = await alternate(variants, plan.rounds)
    ours, theirs = (runs.each(name, measure.tokens_per_second) for name in variants)
    if not ours or not theirs:
        return [Row("mixed_sampling", note=runs.why_not(*variants))]
    return [compared("mixed_sampling", ours, theirs, note="logprobs of half the requests among them")]


async def long_prompt(plan: Plan) -> list[Row]:
    """Measure the worst gap of a running stream from a long prompt's arrival to its first token, over the median before."""
    words = plan.pick(3980, 500)
    side = partial(SIDES["wsserver"], plan.setting(streams=2))
    runs = await alternate({"wsserver": Variant(side, partial(_beside_long_prompt, words))}, plan.rounds)
    if not (found := runs.found.get("wsserver")):
        return [Row("long_prompt", note=runs.why_not("wsserver"))]
    worst, medians = [1000 * gap for gap, _, _ in found], [1000 * median for _, median, _ in found]
    prompt = found[0][2]
    note = f"a prompt of {prompt.prompt_tokens} tokens, its first one after {prompt.ttft:.1f} s"
    return [compared("long_prompt", worst, medians, note=note)]


async def load_beside(plan: Plan) -> list[Row]:
    """Measure the worst gap of a running stream while another model is loaded, over the median before."""
    side = partial(SIDES["wsserver"], plan.setting(streams=2))
    runs = await alternate({"wsserver": Variant(side, _beside_load)}, plan.rounds)
    if not (found := runs.found.get("wsserver")):
        return [Row("load_beside", note=runs.why_not("wsserver"))]
    worst, medians = [1000 * gap for gap, _, _ in found], [1000 * median for _, median, _ in found]
    return [compared("load_beside", worst, medians, note=f"a load of {found[0][2]:.1f} s")]


async def quantised(plan: Plan) -> list[Row]:
    """Measure one stream of a quantised model against the same model as bfloat16, and what their weights take."""
    side = partial(SIDES["wsserver"], plan.setting(dtype="bfloat16"))
    runs = await alternate({"wsserver": Variant(side, partial(_at_each_precision, plan.pick(128, 16)))}, plan.rounds)
    if not (found := runs.found.get("wsserver")):
        return [Row("quantised.nf4", note=runs.why_not("wsserver"))]
    rows = []
    for kind in QUANTISED:
        ours, theirs = ([speed for each in found for speed in each[name][0]] for name in (kind, "none"))
        sizes = [found[0][name][1] / (1 << 20) for name in (kind, "none")]
        rows.append(compared(f"quantised.{kind}", ours, theirs, note="weights of {:.0f} MiB, else {:.0f}".format(*sizes)))
    return rows


async def chat(plan: Plan) -> list[Row]:
    """Count the tokens that a conversation of ten turns prefills, over its length in the end."""
    side = partial(SIDES["wsserver"], plan.setting())
    runs = await alternate({"wsserver": Variant(side, partial(_converse, plan.pick(48, 12)))}, plan.rounds)
    if not (found := runs.found.get("wsserver")):
        return [Row("chat", note=runs.why_not("wsserver"))]
    prefilled = [sum(t.prompt_tokens - t.cached_tokens for t in turns) for turns in found]
    final = [turns[-1].prompt_tokens + turns[-1].completion_tokens for turns in found]
    return [compared("chat", prefilled, final)]


def _mixture(index: int) -> dict[str, Any]:
    fields = dict(MIXTURES[index % len(MIXTURES)])
    return fields | {"logit_bias": {"0": -100} | fields.get("logit_bias", {})}


async def _beside_long_prompt(words: int, side: Side) -> tuple[float, float, Trace]:
    """Give the stream's worst gap while the prompt is prefilled, its median gap before, and what the prompt's client saw."""
    long = Request(prompts(1, lengths=(words,), seed=4)[0], 1)
    return await _beside(side, side.stream(long))


async def _beside_load(side: Side) -> tuple[float, float, float]:
    """Give the stream's worst gap while the model is loaded once more, its median gap before, and the load's seconds."""
    assert isinstance(side, WebSocketSide)
    client = await Client.connect(side.url)
    return await _beside(side, _load(client, dtype="bfloat16"))


async def _at_each_precision(tokens: int, side: Side) -> dict[str, tuple[list[float], int]]:
    """Give the tokens per second of one stream, twice for each precision, and the bytes of its weights."""
    assert isinstance(side, WebSocketSide)
    client = await Client.connect(side.url)
    request = Request(prompts(1, lengths=(16,), seed=3)[0], tokens)
    found: dict[str, tuple[list[float], int]] = {}
    order = ("none", *QUANTISED)
    for kind in (*order, *order[::-1]):
        await _load(client, quantization=kind)
        await client.stream(replace(request, max_tokens=4))
        speeds, _ = found.setdefault(kind, ([], await _weight_bytes(client, kind)))
        speeds.append(1 / (await client.stream(request)).tpot)
    return found


async def _weight_bytes(client: Client, quantization: str) -> int:
    await client.send(type="status")
    async for _, frame in client.frames():
        if frame["type"] == "status":
            break
    (entry,) = (entry for entry in frame["models"] if entry["quantization"] == quantization)
    return int(entry["memory_bytes"] - entry["kv_cache"]["bytes"])


async def _load(client: Client, **how: str) -> float:
    """Load the model in another way; give the seconds that took."""
    began = await client.send(type="init", id="load", **how)
    async for now, frame in client.frames():
        if frame["type"] == "ready":
            return now - began
        if frame["type"] == "error":
            break
    raise SideFailed(f"the load failed: {frame['message']}")


async def _beside(side: Side, work: Coroutine[Any, Any, T]) -> tuple[float, float, T]:
    """Give a stream's worst gap while `work` is done, its median gap before, and what the work gives."""
    assert isinstance(side, WebSocketSide)
    stream = await Client.connect(side.url)
    await stream.generate(Request(prompts(1, lengths=(16,), seed=3)[0], 4000))
    arrivals: list[float] = []
    began = ended = 0.0
    doing: asyncio.Task[T] | None = None
    async for now, frame in stream.frames():
        if frame["type"] != "token":
            continue
        arrivals.append(now)
        if doing is None and len(arrivals) == 32:
            began, doing = now, asyncio.create_task(work)
        if doing and doing.done() and not ended:
            ended = now
        if ended and arrivals[-2] > ended:
            await stream.send(type="cancel", id="g")
            break
    assert doing is not None
    gaps = list(pairwise(arrivals))
    before = [b - a for a, b in gaps if b <= began]
    during = [b - a for a, b in gaps if b > began and a < ended]
    return max(during), measure.quantile(before, 0.5), await doing


async def _converse(max_tokens: int, side: Side) -> list[Trace]:
    """Ask, and ask on with all that was said before; give every turn's trace."""
    assert isinstance(side, WebSocketSide)
    client = await Client.connect(side.url)
    said: list[dict[str, str]] = []
    turns = []
    for turn in range(TURNS):
        said.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        fields = {"messages": said, "temperature": 0, "max_tokens": max_tokens, "stream": False}
        trace, done = await client.answer(await client.send(type="generate", id="g", **fields))
        said.append({"role": "assistant", "content": done["text"]})
        turns.append(trace)
    return turns


ROWS: dict[str, Measurement] = {
    "mixed_sampling": mixed_sampling,
    "long_prompt": long_prompt,
    "load_beside": load_beside,
    "quantised": quantised,
    "chat": chat,
}
