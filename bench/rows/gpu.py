"""The GPU rows: models of true shape with random weights, made on the spot and deleted afterwards; else they wait."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from bench import measure, table
from bench.load import Request, prompts, requests
from bench.machine import has_gpu, read_rate, step_bytes
from bench.measure import Trace
from bench.rows.server import after_cancels
from bench.runs import Measurement, Plan, Runs, Variant, alternate, closed
from bench.sides import ECHO, SIDES
from bench.sides.process import ROOT, SideFailed
from bench.sides.side import Side
from bench.sides.websocket import Client, WebSocketSide
from bench.table import Row, compared, single
from bench.targets import TARGETS

PROMPT, ANSWER = 384, 256  # tokens: 512 of context in the mean
MOST = 64  # streams
WORDS = tuple(f"w{i}" for i in range(2, 1000))  # tokens of the random models, one word each


async def one_model(plan: Plan, shape: str) -> list[Row]:
    """Measure the rows of one model."""
    if not has_gpu():
        return [Row(name, note="waits for a GPU") for name in TARGETS if name.startswith(f"{shape}.")]
    bandwidth, _ = read_rate(plan.threads, "cuda")
    with _model_folder(shape, "cuda") as model:
        on_gpu = replace(plan, model=model, dtype="bfloat16", device="cuda", decode="graph", bandwidth=bandwidth)
        return await rows_of(on_gpu, shape)


async def rows_of(plan: Plan, shape: str) -> list[Row]:
    """Measure the rows of one model whose folder is there."""
    rows: list[Row] = []

    def keep(*found: Row) -> None:
        # A GPU is often lent for a time: what is known when that ends should not be lost.
        print(table.text(found), file=sys.stderr, flush=True)
        rows.extend(found)

    for streams in (1, 16, MOST):
        if f"{shape}.{streams}" in TARGETS:
            keep(*await _streams(plan, shape, streams))
    if f"{shape}.load" in TARGETS:
        for measured in (_first_token, _cancels, _acknowledged, _load):
            keep(await measured(plan, shape))
    return rows


async def _streams(plan: Plan, shape: str, streams: int) -> list[Row]:
    """Measure so many streams at once: their share of the floor, and whatever peers have a row at that number."""
    asked = requests(streams, [ANSWER], lengths=(PROMPT,), words=WORDS)
    peers = {1: ("generate",), MOST: ("cb", "cb_best", "loop")}.get(streams, ())
    peers = tuple(peer for peer in peers if f"{shape}.{peer}" in TARGETS)
    setting = plan.setting(streams)
    sides = {name: Variant(partial(SIDES[name], setting), closed(streams, asked), streams) for name in ("wsserver", *peers)}
    runs = await alternate(sides, plan.rounds)
    floor = step_bytes(setting.folder, plan.dtype, streams, PROMPT + ANSWER // 2) / plan.bandwidth
    # A step's time, from gaps while all streams decode: their prefill is not what the floor is about.
    steps = [gaps for traces in runs.found.get("wsserver", []) if (gaps := measure.steady_itls(traces))]
    medians = [measure.quantile(gaps, 0.5) for gaps in steps]
    shares = [floor / median for median in medians]
    note = f"the floor is {1000 * floor:.2f} ms a step, {plan.bandwidth / 1e12:.2f} TB/s"
    rows = [_own(f"{shape}.{streams}", runs, shares, note), *(_against(shape, peer, runs) for peer in peers)]
    if f"{shape}.jitter" in TARGETS and streams == MOST:
        jitter = [measure.quantile(gaps, 0.99) / median for gaps, median in zip(steps, medians, strict=True)]
        rows.append(_own(f"{shape}.jitter", runs, jitter))
    return rows


def _against(shape: str, peer: str, runs: Runs[list[Trace]]) -> Row:
    ours, theirs = (runs.each(name, measure.tokens_per_second) for name in ("wsserver", peer))
    name = f"{shape}.{peer}"
    return compared(name, ours, theirs) if ours and theirs else Row(name, note=runs.why_not("wsserver", peer))


def _own(name: str, runs: Runs[Any], found: list[float], note: str = "") -> Row:
    """Make a row of our own figures; without any it says why."""
    why = runs.why_not("wsserver") or "the streams never all decoded at once"
    return single(name, found, note=note) if found else Row(name, note=why)


async def _first_token(plan: Plan, shape: str) -> Row:
    """Measure the first token of a short prompt on an idle server, over the time that reading the weights once takes."""
    asked = requests(plan.pick(20, 3), [2], lengths=(16,), words=WORDS)
    runs = await alternate({"wsserver": Variant(partial(SIDES["wsserver"], plan.setting()), closed(1, asked))}, plan.rounds)
    floor = step_bytes(plan.setting().folder, plan.dtype, 1, 16) / plan.bandwidth
    over = runs.each("wsserver", lambda traces: 1000 * (measure.ttft(traces) - floor))
    return _own(f"{shape}.first_token", runs, over, f"the floor is {1000 * floor:.2f} ms")


async def _cancels(plan: Plan, shape: str) -> Row:
    """Measure in how many steps a cancel frees its slot for the next request."""
    texts = prompts(3 * plan.pick(20, 2), lengths=(16,), seed=7, words=WORDS)
    side = partial(SIDES["wsserver"], plan.setting())
    runs = await alternate({"wsserver": Variant(side, partial(after_cancels, texts))}, plan.rounds)
    steps = runs.each("wsserver", lambda found: (found[0] - found[1]) / found[2])
    return _own(f"{shape}.cancel", runs, steps)


async def _acknowledged(plan: Plan, shape: str) -> Row:
    """Measure how long a cancel waits for its `done`."""
    texts = prompts(plan.pick(100, 5), lengths=(16,), seed=8, words=WORDS)
    side = partial(SIDES["wsserver"], plan.setting())
    runs = await alternate({"wsserver": Variant(side, partial(_acknowledgements, texts))}, plan.rounds)
    found = runs.each("wsserver", lambda waits: 1000 * measure.quantile(waits, 0.99))
    return _own(f"{shape}.cancel_ack", runs, found)


async def _acknowledgements(texts: list[str], side: Side) -> list[float]:
    assert isinstance(side, WebSocketSide)
    client = await Client.connect(side.url)
    waits = []
    for text in texts:
        await client.generate(Request(text, 1000))
        seen, sent = 0, 0.0
        async for now, frame in client.frames():
            seen += frame["type"] == "token"
            if seen == 10 and not sent:
                sent = await client.send(type="cancel", id="g")
            if frame["type"] == "done":
                waits.append(now - sent)
    return waits


async def _load(plan: Plan, shape: str) -> Row:
    """Measure the load of a model whose files were read a moment ago, from its first tensor to its warm-up."""
    side = partial(SIDES["wsserver"], plan.setting(model=ECHO))
    size = sum(file.stat().st_size for file in plan.setting().folder.glob("*.safetensors"))
    runs = await alternate({"wsserver": Variant(side, partial(_weights_loaded, plan))}, plan.rounds)
    found = runs.each("wsserver", lambda seconds: size / seconds / 1e9)
    return _own(f"{shape}.load", runs, found)


async def _weights_loaded(plan: Plan, side: Side) -> float:
    """Give the seconds from the first to the last report of the weights' stage."""
    assert isinstance(side, WebSocketSide)
    client = await Client.connect(side.url)
    await client.send(type="init", id="load", model=plan.model, dtype=plan.dtype, device=plan.device)
    stages: dict[str, float] = {}
    async for now, frame in client.frames():
        if frame["type"] == "error":
            raise SideFailed(f"{frame['code']}: {frame['message']}")
        stages.setdefault(frame.get("stage", frame["type"]), now)
        if frame["type"] == "ready":
            break
    return stages["warmup"] - stages["weights"]


@contextmanager
def _model_folder(shape: str, device: str) -> Iterator[str]:
    """Make a model with random weights, and delete it in the end; give its id."""
    folder = ROOT / "LLM" / "bench" / shape
    try:
        subprocess.run([sys.executable, "-m", "bench.random_model", shape, str(folder), device], cwd=ROOT, check=True)
        yield f"bench/{shape}"
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


ROWS: dict[str, Measurement] = {shape: partial(one_model, shape=shape) for shape in ("llama_3b", "mistral_7b", "qwen_0_6b")}
