"""The runner against the stock model: chunks, neighbours and freed sequences must not show in what a model says.

The models are tiny and random, of architectures that keep their caches differently.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock
from weakref import WeakSet

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from LLM.engine import runner as runner_module
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.runner import TransformersRunner
from LLM.engine.sampler import sample
from LLM.engine.scheduler import Scheduler, Sequence, Slice

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **SIZES),
    "mistral-window-8": partial(MistralConfig, sliding_window=8, **SIZES),
    "gemma3-window-8": partial(Gemma3TextConfig, sliding_window=8, layer_types=LAYERS, **SIZES),
    "gpt2": partial(
        GPT2Config, vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0
    ),
}
GREEDY = Sampling(temperature=0)
NEW_TOKENS = 12
PROMPTS = {"one": [5], "short": list(range(20, 27)), "long": [(7 * i * i + 3) % 96 for i in range(61)]}


@pytest.fixture(autouse=True)
def _one_thread():
    # These models are so small that two threads do nothing but wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stock_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = CONFIGS[name]()
    config.update(changes)
    # Wider than usual, so that different contexts give clearly different logits.
    config.initializer_range = 0.4
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return stock_model(request.param)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[Any, list[torch.Tensor]]:
    """Every row of logits that was sampled from, by request."""
    seen: dict[Any, list[torch.Tensor]] = {}

    def watched(logits: torch.Tensor, sequence: Sequence) -> int:
        seen.setdefault(sequence.request.key, []).append(logits.clone())
        return sample(logits, sequence)

    monkeypatch.setattr(runner_module, "sample", watched)
    return seen


def request(key: str, sampling: Sampling = GREEDY, max_tokens: int = NEW_TOKENS) -> GenerationRequest:
    return GenerationRequest(key, tuple(PROMPTS[key]), max_tokens, sampling)


def run(runner: TransformersRunner, requests: list[GenerationRequest], chunk: int = 256) -> dict[Any, list[int]]:
    """Generate until every request has its tokens; give them."""
    scheduler = Scheduler(len(requests), chunk)
    sequences = {r.key: scheduler.add(r) for r in requests}
    while batch := scheduler.next_batch():
        for part, token_id in zip(batch, runner.step(batch), strict=True):
            finish(runner, scheduler, part, token_id)
    return {key: sequence.completion_ids for key, sequence in sequences.items() if sequence}


def finish(runner: TransformersRunner, scheduler: Scheduler, part: Slice, token_id: int | None) -> None:
    sequence = part.sequence
    assert (token_id is None) == (part.stop < len(sequence.request.prompt_ids))
    if token_id is not None:
        sequence.token_ids.append(token_id)
    if sequence.completion_tokens == sequence.request.max_tokens:
        scheduler.remove(sequence.request.key)
        runner.free(sequence.request.key)


def reference(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("key", PROMPTS)
@pytest.mark.parametrize("chunk", [256, 31, 8, 7, 1])
def test_a_prefill_in_any_chunks_gives_the_stock_models_continuation_and_logits(
    model: Any, rows: dict[Any, list[torch.Tensor]], key: str, chunk: int
):
    generated = run(TransformersRunner(model), [request(key)], chunk)[key]
    assert len(rows[key]) == NEW_TOKENS
    with torch.inference_mode():
        whole = model(torch.tensor([PROMPTS[key] + generated]), use_cache=False).logits[0, len(PROMPTS[key]) - 1 : -1]
    torch.testing.assert_close(torch.stack(rows[key]), whole, atol=1e-4, rtol=0)
    assert generated == whole.argmax(-1).tolist()


@pytest.mark.parametrize("key", PROMPTS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_is_the_stock_models_own_generate(architecture: str, key: str):
    model = stock_model(architecture, eos_token_id=None)  # the runner knows nothing of ends
    assert run(TransformersRunner(model), [request(key)])[key] == reference(model, PROMPTS[key])


@pytest.mark.parametrize("chunk", [256, 7])
def test_interleaved_sequences_do_not_disturb_each_other(model: Any, chunk: int):
    runner = TransformersRunner(model)
    drawn = Sampling(temperature=1.5, seed=11)
    requests = [request("long", drawn), request("one", max_tokens=30), request("short", drawn)]
    alone = {r.key: run(runner, [r], chunk)[r.key] for r in requests}
    assert run(runner, requests, chunk) == alone
    assert run(TransformersRunner(model), requests[::-1], chunk) == alone


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the caches that somebody still holds."""
    alive: WeakSet[DynamicCache] = WeakSet()

    class Watched(DynamicCache):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            alive.add(self)

    def count() -> int:
        gc.collect()
        return len(alive)

    monkeypatch.setattr(runner_module, "DynamicCache", Watched)
    return count


def test_free_drops_the_cache_of_that_sequence_alone(caches: Callable[[], int]):
    runner = TransformersRunner(stock_model("llama"))
    for key in ("long", "short"):
        scheduler = Scheduler(1)
        scheduler.add(request(key))
        runner.step(scheduler.next_batch())
    assert caches() == 2
    runner.free("long")
    runner.free("long")
    runner.free("never seen")
    assert caches() == 1
    runner.free("short")
    assert caches() == 0


def test_a_key_that_was_freed_half_way_through_its_prefill_begins_afresh():
    runner = TransformersRunner(stock_model("llama"))
    whole = run(runner, [request("long")])
    half = Scheduler(1, prefill_chunk=40)
    half.add(request("long"))
    assert runner.step(half.next_batch()) == [None]
    runner.free("long")
    assert run(runner, [request("long")]) == whole


def test_a_sequence_of_a_step_that_raised_can_be_freed_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    runner = TransformersRunner(stock_model("llama"))
    short = run(runner, [request("short")])
    scheduler = Scheduler(1)
    scheduler.add(request("long"))
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "sample", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            runner.step(scheduler.next_batch())
    runner.free("long")
    assert run(runner, [request("short")]) == short


def test_memory_counts_tied_weights_once():
    tied, untied = stock_model("llama"), stock_model("llama", tie_word_embeddings=False)
    table = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    assert TransformersRunner(untied).memory_bytes - TransformersRunner(tied).memory_bytes == table
    unique = sum(p.numel() * p.element_size() for p in tied.parameters())
    buffers = sum(b.numel() * b.element_size() for b in tied.buffers())
    assert TransformersRunner(tied).memory_bytes == unique + buffers


def test_memory_counts_bytes_not_numbers():
    model = stock_model("llama")
    whole, half = TransformersRunner(model).memory_bytes, TransformersRunner(model.to(torch.bfloat16)).memory_bytes
    assert half == pytest.approx(whole / 2, rel=0.01)


def test_warming_up_leaves_nothing_behind(caches: Callable[[], int]):
    runner = TransformersRunner(stock_model("llama"))
    expected = run(runner, [request("short")])
    runner.warm_up()
    assert caches() == 0
    assert run(runner, [request("short")]) == expected


def test_a_step_keeps_no_gradients(rows: dict[Any, list[torch.Tensor]]):
    run(TransformersRunner(stock_model("llama")), [request("short")])
    assert all(row.is_inference() and not row.requires_grad for row in rows["short"])
