"""Loads at the same moment, with real models of tied embeddings: each is right, and a third model's streams stay exact."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config

from LLM import loader
from tests import makers
from tests.conftest import running
from tests.gguf_writer import write_gguf

BESIDE = "acme/beside"
# What is loaded, in the order of the pairs: a model, and how.
LOADS: dict[str, dict[str, str]] = {
    "float32": {"model": "acme/llama", "dtype": "float32"},
    "bfloat16": {"model": "acme/llama", "dtype": "bfloat16"},
    "int8": {"model": "acme/llama", "dtype": "float32", "quantization": "int8"},
    "gguf": {"model": "acme/gguf", "dtype": "float32"},
    "qwen3": {"model": "acme/qwen3", "dtype": "bfloat16"},
}
SAMPLING = {"temperature": 0.9, "top_p": 0.93, "min_p": 0.013, "seed": 7, "repetition_penalty": 1.13}
ASKED: dict[str, Any] = {"prompt": "Why?", "max_tokens": 12, "ignore_eos": True, **SAMPLING}
PENALTIES = {"presence_penalty": 0.37, "frequency_penalty": 0.21, "logit_bias": {"65": 1.003}}
LONG = ASKED | PENALTIES | {"max_tokens": 150}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    makers.tiny_folder(root / BESIDE)
    makers.tied_folder(root / "acme" / "llama", LlamaConfig, makers.SIZES, torch.float32)
    makers.tied_folder(root / "acme" / "qwen3", Qwen3Config, makers.SIZES)
    (root / "acme" / "gguf").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "acme" / "llama" / file, root / "acme" / "gguf")
    write_gguf(root / "acme" / "gguf" / "model.gguf", root / "acme" / "llama")
    return root


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Overlap:
    """Lets two loads begin together, and keeps each inside a model's construction until the other one is there too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = self._inside = 0
        self._lock, self._met = threading.Lock(), threading.Event()
        self._begin = threading.Barrier(2, timeout=30)
        monkeypatch.setattr(loader, "load", self._together(loader.load))
        monkeypatch.setattr(PreTrainedModel, "__init__", self._slow(PreTrainedModel.__init__))

    def _together(self, load: Any) -> Any:
        def begin(*arguments: Any) -> Any:
            self._begin.wait()
            return load(*arguments)

        return begin

    def _slow(self, construct: Any) -> Any:
        def constructed(model: Any, *arguments: Any, **options: Any) -> None:
            with self._lock:
                self._inside += 1
                self.most = max(self.most, self._inside)
                if self._inside == 2:
                    self._met.set()
            # Loads that come one after the other never meet: long enough for two that could, and no assertion's limit.
            self._met.wait(0.3)
            construct(model, *arguments, **options)
            with self._lock:
                self._inside -= 1

        return constructed


async def texts_of(server: Any, loads: list[dict[str, str]]) -> list[str]:
    """Load models at once, each for a client of its own, and give what each of them writes."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.client()) for _ in loads]
        for client, load in zip(clients, loads, strict=True):
            await client.send(type="init", id="load", **load)
        for client in clients:
            assert (await client.until("ready", "error", id="load"))["type"] == "ready"
        dones = [await client.generate(id="g", **ASKED) for client in clients]
        return [done["joined"] for done in dones]


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, str]:
    """What each load writes that has the process to itself."""

    async def write() -> dict[str, str]:
        async with running("wsserver/echo", root, device="cpu", kv_memory=1 << 20) as server:
            return {name: (await texts_of(server, [load]))[0] for name, load in LOADS.items()}

    return asyncio.run(write())


@pytest.mark.parametrize("pair", list(combinations(LOADS, 2)), ids="-".join)
async def test_two_loads_at_once_are_those_of_each_alone_and_streams_beside_them_stay_exact(
    root: Path, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]
):
    async with running(BESIDE, root, device="cpu", dtype="float32", kv_memory=1 << 20) as server, server.client() as beside:
        quiet = (await beside.generate(id="quiet", **LONG))["joined"]
        overlap = Overlap(monkeypatch)
        loads = asyncio.create_task(texts_of(server, [LOADS[name] for name in pair]))
        rounds = 0
        while not loads.done() or rounds < 2:
            rounds += 1
            assert (await beside.generate(id=f"beside-{rounds}", **LONG))["joined"] == quiet
        assert await loads == [alone[name] for name in pair]
        assert overlap.most == 1
        assert (await beside.generate(id="after", **LONG))["joined"] == quiet
        assert torch.get_default_dtype() == torch.float32
