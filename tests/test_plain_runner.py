"""The plain runner against the stock model, with models whose attention cannot be paged, and some whose could.

They are tiny and random, of architectures that keep their caches differently.
"""

import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock
from weakref import WeakSet

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    FalconH1Config,
    Gemma3TextConfig,
    GPTJConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    Qwen3NextConfig,
    RwkvConfig,
)

from LLM.engine import plain_runner as runner_module
from LLM.engine.attention import DoesNotFit
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.plain_runner import PlainRunner
from LLM.engine.request import GenerationRequest, Sampled, Sampling
from LLM.engine.sampler import sample
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import Sequence

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
}
# The runner knows nothing of ends.
TOKENS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
GPT_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
LLAMA = (LlamaConfig, SIZES)
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": LLAMA,
    "mistral, window of 8": (MistralConfig, SIZES | {"sliding_window": 8}),
    "gemma3, windows of 8": (
        Gemma3TextConfig,
        SIZES | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-oss, sinks": (GptOssConfig, SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "llama4, chunks of 8": (
        Llama4TextConfig,
        SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
    ),
    "bloom, biased by distance": (BloomConfig, GPT_SIZES | {"hidden_size": 32}),
    "gptj, attention of its own": (GPTJConfig, GPT_SIZES | {"n_positions": 512, "rotary_dim": 4}),
    "qwen3-next, linear attention": (Qwen3NextConfig, SIZES | HYBRID),
    "falcon-h1, state spaces": (
        FalconH1Config,
        SIZES | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
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


def make(kind: Any, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    config = kind(**sizes, **TOKENS)
    # Wider than usual, so that different contexts give clearly different logits.
    config.initializer_range = 0.4
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return make(*CONFIGS[request.param])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[Any, list[torch.Tensor]]:
    """Every row of logits that was sampled from, by request."""
    seen: dict[Any, list[torch.Tensor]] = {}

    def watched(logits: torch.Tensor, sequences: list[Sequence]) -> Any:
        for row, sequence in zip(logits, sequences, strict=True):
            seen.setdefault(sequence.request.key, []).append(row.clone())
        return sample(logits, sequences)

    monkeypatch.setattr(runner_module, "sample", watched)
    return seen


def request(key: str, sampling: Sampling = GREEDY, max_tokens: int = NEW_TOKENS) -> GenerationRequest:
    return GenerationRequest(key, tuple(PROMPTS[key]), max_tokens, sampling)


def scheduler_of(runner: PlainRunner, *requests: GenerationRequest, chunk: int = 256) -> Scheduler:
    pool = BlockPool(runner.block_count, runner.block_size)
    scheduler = Scheduler(len(requests), pool, Pacing(chunk), reuse=runner.reuses_blocks)
    for one in requests:
        assert scheduler.can_ever_run(one)
        assert scheduler.add(one)
    return scheduler


def run(runner: PlainRunner, requests: list[GenerationRequest], chunk: int = 256) -> dict[Any, list[int]]:
    """Generate until every request has its tokens; give them."""
    scheduler, texts = scheduler_of(runner, *requests, chunk=chunk), {}
    while batch := scheduler.next_batch():
        results = runner.step(batch)
        scheduler.retire(batch)
        scheduler.pacing.measured(sum(part.decodes for part in batch), sum(not part.decodes for part in batch), 1.0)
        for part, result in zip(batch, results, strict=True):
            key, sequence = part.sequence.request.key, part.sequence
            assert (result is None) == (part.stop < len(sequence.request.prompt_ids))
            if result is not None:
                sequence.token_ids.append(result.token_id)
            if sequence.completion_tokens == sequence.request.max_tokens:
                texts[key] = sequence.completion_ids
                scheduler.remove(key)
                runner.free(key)
    return texts


def plain(model: Any) -> PlainRunner:
    return PlainRunner(model, "for a reason")


def stock_greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("chunk", [256, 7, 1])
def test_a_prefill_in_any_chunks_gives_the_stock_models_continuation_and_logits(
    model: Any, rows: dict[Any, list[torch.Tensor]], chunk: int
):
    texts = run(plain(model), [request(key) for key in PROMPTS], chunk)
    for key, prompt in PROMPTS.items():
        assert len(rows[key]) == NEW_TOKENS
        with torch.inference_mode():
            whole = model(torch.tensor([prompt + texts[key]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.cat(rows[key]).view_as(whole), whole, atol=1e-4, rtol=0)
        assert texts[key] == stock_greedy(model, prompt)


@pytest.mark.parametrize("name", ["llama", "gpt-oss, sinks", "qwen3-next, linear attention"])
def test_drawn_tokens_are_the_same_beside_any_neighbours(name: str):
    model, drawn = make(*CONFIGS[name]), Sampling(temperature=1.5, seed=11)
    requests = [request("long", drawn), request("one", max_tokens=20), request("short", drawn)]
    alone = {r.key: run(plain(model), [r])[r.key] for r in requests}
    assert run(plain(model), requests[::-1], chunk=7) == alone


def test_a_text_in_parts_is_to_these_models_what_the_whole_is(model: Any):
    runner = plain(model)
    runner.check()
    assert not runner._caches


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        (MambaConfig, SIZES, "differ"),
        (RwkvConfig, SIZES | {"attention_hidden_size": 32}, "differ"),
        (
            JambaConfig,
            SIZES | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
            "differ",
        ),
        (MiniMaxConfig, SIZES | {"num_local_experts": 2}, "^it raises ValueError$"),
    ],
)
def test_a_model_that_cannot_go_on_from_a_cache_is_found_out(kind: Any, sizes: dict[str, Any], why: str):
    with pytest.raises(DoesNotFit, match=why):
        plain(make(kind, sizes)).check()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_a_sequence_whose_cache_outgrows_the_memory_ends_and_its_neighbours_go_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
):
    model = make(*LLAMA)
    short = run(plain(model), [request("short")])["short"]
    runner = plain(model)
    scheduler, said = scheduler_of(runner, request("long"), request("short")), []
    whole = model.forward
    monkeypatch.setattr(
        model, "forward", Mock(side_effect=lambda **i: whole(**i) if len(i["input_ids"][0]) < 60 else fail())
    )

    def fail() -> None:
        raise error

    (long, part) = scheduler.next_batch()
    assert runner.step([long, part])[0] == Sampled(None)
    scheduler.retire([long, part])
    said.append(short[0])
    scheduler.remove("long")
    part.sequence.token_ids += said
    while len(said) < NEW_TOKENS:
        batch = scheduler.next_batch()
        (result,) = runner.step(batch)
        scheduler.retire(batch)
        assert result
        said.append(result.token_id)
        part.sequence.token_ids.append(result.token_id)
    assert said == short


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
    runner = plain(make(*LLAMA))
    for key in ("long", "short"):
        runner.step(scheduler_of(runner, request(key)).next_batch())
    assert caches() == 2
    runner.free("long")
    runner.free("long")
    runner.free("never seen")
    assert caches() == 1
    runner.free("short")
    assert caches() == 0


def test_a_sequence_that_begins_again_after_being_preempted_begins_afresh():
    runner = plain(make(*LLAMA))
    whole = run(runner, [request("long"), request("short")])
    scheduler = scheduler_of(runner, request("long"), request("short"), chunk=80)
    sequences = {sequence.request.key: sequence for sequence in scheduler.waiting}
    preempted = False
    while batch := scheduler.next_batch():
        for part, result in zip(batch, runner.step(batch), strict=True):
            part.sequence.token_ids += [result.token_id] if result else []
        scheduler.retire(batch)
        preempted = preempted or scheduler.run_one_less()
        for key in [key for key, s in scheduler.running.items() if s.completion_tokens == NEW_TOKENS]:
            scheduler.remove(key)
    assert preempted
    assert {key: sequence.completion_ids for key, sequence in sequences.items()} == whole


def test_a_sequence_of_a_step_that_raised_can_be_freed_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    runner = plain(make(*LLAMA))
    short = run(runner, [request("short")])
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "sample", Mock(side_effect=RuntimeError))
        with pytest.raises(RuntimeError):
            runner.step(scheduler_of(runner, request("long")).next_batch())
    runner.free("long")
    assert run(runner, [request("short")]) == short


def test_any_sequence_takes_one_block_so_that_none_is_ever_preempted():
    runner = plain(make(*LLAMA))
    pool = BlockPool(runner.block_count, runner.block_size)
    assert [pool.blocks_for(tokens) for tokens in (1, 1 << 20)] == [1, 1]
    assert pool.free > 1000
    assert not runner.reuses_blocks


def test_memory_is_that_of_the_weights_and_the_reason_is_told():
    model = make(*LLAMA)
    runner = PlainRunner(model, "for a reason")
    unique = sum(p.numel() * p.element_size() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert (runner.memory_bytes, runner.kv_bytes, runner.notes) == (unique, 0, ["for a reason"])


def test_memory_counts_bytes_not_numbers():
    model = make(*LLAMA)
    whole, half = plain(model).memory_bytes, plain(model.to(torch.bfloat16)).memory_bytes
    assert half == pytest.approx(whole / 2, rel=0.01)


def test_a_step_keeps_no_gradients(rows: dict[Any, list[torch.Tensor]]):
    run(plain(make(*LLAMA)), [request("short")])
    assert all(row.is_inference() and not row.requires_grad for row in rows["short"])
