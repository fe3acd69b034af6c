"""What a loaded model writes does not depend on torch's default dtype, which a load beside it changes for the process."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from LLM._base_model_handler import LoadedModel, LoadOptions
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest, Sampled, Sampling
from LLM.engine.sampler import sample
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import Sequence
from LLM.loader import load
from tests import makers

FAMILIES: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
CPU = LoadOptions(device="cpu", kv_memory=1 << 20)
SETTINGS = Sampling(
    seed=5,
    temperature=0.77,
    top_p=0.913,
    top_k=211,
    min_p=0.0013,
    repetition_penalty=1.137,
    presence_penalty=0.37,
    frequency_penalty=0.21,
    logit_bias={65: 1.003},
)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def under(default: torch.dtype, do: Callable[[], Any]) -> Any:
    torch.set_default_dtype(default)
    try:
        return do()
    finally:
        torch.set_default_dtype(torch.float32)


def request(key: str, sampling: Sampling) -> GenerationRequest:
    return GenerationRequest(key, tuple(range(40, 60)), 24, sampling, logprobs=3)


def generated(model: LoadedModel) -> list[Sampled]:
    """Run several requests beside each other to their ends, and give all that was sampled."""
    runner = model.runner
    scheduler = Scheduler(4, BlockPool(runner.block_count, runner.block_size), Pacing(runner.max_prefill))
    ways = [SETTINGS, replace(SETTINGS, top_k=0, top_p=1.0, min_p=0.0), Sampling(temperature=0, seed=1)]
    sequences = [scheduler.add(request(str(n), way)) for n, way in enumerate(ways)]
    told: list[Sampled] = []
    while any(sequence and sequence.completion_tokens < 24 for sequence in sequences):
        batch = scheduler.next_batch()
        for part, sampled in zip(batch, runner.step(batch), strict=True):
            if sampled and sampled.token_id is not None:
                part.sequence.token_ids.append(sampled.token_id)
                told.append(sampled)
        scheduler.retire(batch)
        for sequence in sequences:
            if sequence and sequence.completion_tokens >= 24:
                scheduler.remove(sequence.request.key)
    return told


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_every_way_of_sampling_gives_the_same_under_any_default_dtype(default: torch.dtype):
    logits = torch.randn(64, 8000, generator=torch.Generator().manual_seed(3)) * 3

    def draw() -> list[Sampled]:
        sequences = [Sequence(request(str(n), replace(SETTINGS, seed=n))) for n in range(64)]
        return sample(logits, sequences).read()

    assert under(default, draw) == under(torch.float32, draw)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_generates_the_same_under_any_default_dtype(tmp_path: Path, family: str, dtype: str, default: torch.dtype):
    makers.tied_folder(tmp_path / "acme" / "model", FAMILIES[family], makers.SIZES)
    options = replace(CPU, dtype=dtype)
    model = load(tmp_path / "acme" / "model", options, lambda stage, done: None)
    told = generated(model)
    assert len(told) == 72
    assert under(default, lambda: generated(model)) == told
    # What is decided and made at the load depends on it no more than a step.
    loaded_so = under(default, lambda: load(tmp_path / "acme" / "model", options, lambda stage, done: None))
    assert generated(loaded_so) == told
