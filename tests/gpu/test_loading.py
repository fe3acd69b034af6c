"""Loading onto a GPU: at every precision, in part onto the CPU, and with its memory back when the model has gone."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LLM import loader
from LLM._base_model_handler import LoadedModel, LoadOptions, Plan
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.runner import PagedRunner
from LLM.engine.scheduler import Scheduler

pytest.importorskip("triton", reason="the decode kernel needs Triton, which there is for Linux alone")

from LLM.engine.graph_runner import GraphRunner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = LoadOptions("bfloat16", "cuda:0", kv_memory=64 << 20, sequences=4)
NEW_TOKENS = 8


def silent(stage: str, progress: float) -> None:
    """Nobody wants to know."""


def greedy(model: LoadedModel, prompt: str) -> str:
    runner, ids = model.runner, tuple(model.tokenizer.encode(prompt).ids)
    scheduler = Scheduler(1, BlockPool(runner.block_count, runner.block_size), Pacing(runner.max_prefill))
    sequence = scheduler.add(GenerationRequest("k", ids, NEW_TOKENS, Sampling(temperature=0)))
    assert sequence
    while sequence.completion_tokens < NEW_TOKENS:
        batch = scheduler.next_batch()
        sequence.token_ids += [s.token_id for s in runner.step(batch) if s and s.token_id is not None]
        scheduler.retire(batch)
    return model.tokenizer.decode(sequence.completion_ids)


@pytest.mark.parametrize(
    ("quantization", "decode"),
    [("none", "auto"), ("none", "eager"), ("int8", "auto"), ("nf4", "auto"), ("fp4", "auto")],
)
def test_the_default_model_knows_what_it_knew_and_its_memory_comes_back(
    default_model_folder: Path, quantization: str, decode: str
):
    options = replace(GPU, quantization=quantization, decode=decode)
    free = []
    # Twice: libraries keep some memory of their own from their first use on.
    for _ in range(2):
        model = loader.load(default_model_folder, options, silent)
        assert type(model.runner) is (GraphRunner if (quantization, decode) == ("none", "auto") else PagedRunner)
        assert model.runner.notes == []
        assert "Paris" in greedy(model, "The capital of France is")
        planned = loader.plan(default_model_folder, options).memory_bytes
        assert planned == pytest.approx(model.runner.memory_bytes, rel=0.1)
        on_unloaded = model.on_unloaded
        assert on_unloaded
        del model
        gc.collect()
        on_unloaded()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[1] < 8 << 20


def test_what_the_gpu_has_no_room_for_lies_on_the_cpu_and_says_the_same(
    default_model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    options = replace(GPU, dtype="float32", device="cuda", offload=True, decode="eager")
    whole = greedy(loader.load(default_model_folder, replace(options, device="cuda:0"), silent), "The capital of France is")
    monkeypatch.setattr(loader, "plan", lambda folder, options: Plan(options, 0, 0))
    monkeypatch.setattr(loader, "shares", lambda options: {0: 300 << 20, "cpu": 4 << 30})
    model = loader.load(default_model_folder, options, silent)
    assert [note for note in model.runner.notes if note.startswith("is spread over")] == ["is spread over 0, cpu"]
    assert greedy(model, "The capital of France is") == whole
