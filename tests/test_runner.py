"""The paged runner against the stock model: chunks, neighbours, reuse and preemption must not show in what a model says.

The models are tiny and random, one of each family that attends in a way of its own. The real scheduler drives them.
"""

import functools
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV3Config,
    DogeConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    StableLmConfig,
)

from LLM.engine import runner as runner_module
from LLM.engine.attention import PagedCache, Row, Step
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.runner import BLOCK_SIZE, DoesNotFit, PagedRunner, page
from LLM.engine.sampler import sample
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import Sequence, Slice

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
    "eos_token_id": None,  # the runner knows nothing of ends
    "pad_token_id": 0,
}
GPT_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": None}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
Config = Callable[..., PreTrainedConfig]


def config(kind: Config, sizes: dict[str, Any] = SIZES, **fields: Any) -> Callable[..., PreTrainedConfig]:
    return functools.partial(kind, **{**sizes, **fields})


FAMILIES: dict[str, Config] = {
    "llama": config(LlamaConfig),
    "mistral with a window": config(MistralConfig, sliding_window=8),
    "qwen2 with a window in one layer": config(Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": config(Qwen3Config),
    "gemma2": config(Gemma2Config, **WINDOWS, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "gemma3": config(Gemma3TextConfig, **WINDOWS, query_pre_attn_scalar=16, final_logit_softcapping=3.0),
    "olmo2": config(Olmo2Config),
    "phi3": config(Phi3Config),
    "cohere2": config(Cohere2Config, **WINDOWS),
    "deepseek3": config(DeepseekV3Config, **LATENT, **EXPERTS, num_key_value_heads=4, moe_intermediate_size=16),
    "gpt2": config(GPT2Config, GPT_SIZES, n_positions=512),
}
NEW_TOKENS = 12
LONG = [(7 * i * i + 3) % 96 for i in range(61)]
# Two that begin alike, for a prefix to be found; most are longer than the windows.
PROMPTS = {"one": [5], "short": list(range(20, 27)), "long": LONG, "like long": [*LONG[:50], 1, 2, 3], "other": LONG[::-1]}


@pytest.fixture(autouse=True)
def _one_thread():
    # These models are so small that two threads do nothing but wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(family: Config, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    config = family()
    # Wider than usual, so that different contexts give clearly different logits.
    config.initializer_range = 0.4
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def paged(model: Any, blocks: int = 40) -> PagedRunner:
    page(model)
    return PagedRunner(model, PagedCache(blocks, BLOCK_SIZE))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Config:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def stock(family: Config) -> Any:
    return make(family)


class Sampled:
    """Every row of logits that was sampled from, by request; what a test may do instead of sampling."""

    def __init__(self) -> None:
        self.rows: dict[Hashable, list[torch.Tensor]] = {}
        self.raises: list[Exception] = []

    def __call__(self, logits: torch.Tensor, sequences: list[Sequence]) -> Any:
        if self.raises:
            raise self.raises.pop()
        for row, sequence in zip(logits, sequences, strict=True):
            self.rows.setdefault(sequence.request.key, []).append(row.clone())
        return sample(logits, sequences)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Sampled:
    seen = Sampled()
    monkeypatch.setattr(runner_module, "sample", seen)
    return seen


def request(key: str, sampling: Sampling | None = None) -> GenerationRequest:
    return GenerationRequest(key, tuple(PROMPTS[key]), NEW_TOKENS, sampling or Sampling(temperature=0))


class Run:
    """Drives a runner as the engine does, until every request has its tokens; beside streams go `chunk` prompt tokens."""

    def __init__(self, runner: PagedRunner, requests: list[GenerationRequest], capacity: int = 8, chunk: int = 9) -> None:
        self.pool = BlockPool(runner.block_count, runner.block_size)
        pacing = Pacing(largest=4 * chunk)
        self.scheduler = Scheduler(capacity, self.pool, pacing)
        self.runner = runner
        self.sequences = {r.key: self.scheduler.add(r) for r in requests}
        self.packed = self.chunked = self.preempted = self.retried = 0
        while batch := self.scheduler.next_batch():
            self.preempted += any(waiting.began for waiting in self.scheduler.waiting)
            if self._step(batch):
                decoding = sum(part.decodes for part in batch)
                prefilled = sum(part.stop - part.start for part in batch) - decoding
                pacing.measured(decoding, prefilled, 1 + 2 * prefilled / chunk)
        self.texts = {key: sequence.completion_ids for key, sequence in self.sequences.items()}
        assert self.pool.free == self.pool.count

    def _step(self, batch: list[Slice]) -> bool:
        try:
            results = self.runner.step(batch)
        except MemoryError:
            self.retried += 1
            return False
        self.scheduler.retire(batch)
        for part, result in zip(batch, results, strict=True):
            assert (result is None) == (not part.samples)
            if result is not None:
                part.sequence.token_ids.append(result.token_id)
            if part.sequence.completion_tokens == part.sequence.request.max_tokens:
                self.scheduler.remove(part.sequence.request.key)
        self.packed += len(batch) > 1
        self.chunked += any(not part.samples for part in batch)
        return True


def logits_of(stock: Any, ids: list[int], count: int) -> torch.Tensor:
    """Give the stock model's logits for the last `count` tokens of a text, in one pass, from what stands before each."""
    with torch.inference_mode():
        return stock(torch.tensor([ids]), use_cache=False).logits[0, -count - 1 : -1]


def generate(stock: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return stock.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0, len(prompt) :].tolist()


def assert_stock(stock: Any, run: Run, sampled: Sampled) -> None:
    """Every row of logits is the stock model's, and so is every text."""
    for key, text in run.texts.items():
        assert len(sampled.rows[key]) == NEW_TOKENS, "nothing is sampled twice"
        whole = logits_of(stock, PROMPTS[str(key)] + text, NEW_TOKENS)
        torch.testing.assert_close(torch.stack(sampled.rows[key]), whole, atol=1e-4, rtol=0)
        assert text == generate(stock, PROMPTS[str(key)])


# What fits.


@pytest.mark.parametrize("chunk", [64, 31, 8, 7, 1])
def test_a_prefill_in_any_chunks_gives_the_stock_logits_at_every_place(family: Config, stock: Any, chunk: int):
    runner, sequence = paged(make(family)), Sequence(request("long"))
    sequence.blocks = [7, 2, 30, 11]
    rows = []
    for start in range(0, len(LONG), chunk):
        stop = min(start + chunk, len(LONG))
        rows.append(runner.forward([Slice(sequence, start, stop)], list(range(stop - start))))
    torch.testing.assert_close(torch.cat(rows), logits_of(stock, [*LONG, 0], len(LONG)), atol=1e-4, rtol=0)


def test_packed_chunked_reused_and_preempted_sequences_say_what_the_stock_model_says(
    family: Config, stock: Any, sampled: Sampled
):
    runner = paged(make(family), blocks=7)
    run = Run(runner, [request(key) for key in PROMPTS], capacity=4)
    assert run.packed > 5
    assert run.chunked > 5
    assert run.preempted
    found = run.sequences["like long"]
    assert found
    assert found.cached_tokens >= 16
    assert_stock(stock, run, sampled)


def test_each_row_gets_its_own_token_wherever_it_stands_in_the_step(sampled: Sampled):
    stock, runner = make(FAMILIES["llama"]), paged(make(FAMILIES["llama"]))
    parts = []
    for key, blocks, stop in (("long", [3, 0, 8, 1], 50), ("short", [5], 7), ("other", [2, 9, 4, 6], 20), ("one", [7], 1)):
        sequence = Sequence(request(key))
        sequence.blocks = blocks
        parts.append(Slice(sequence, 0, stop))
    results = runner.step(parts)
    assert [result is None for result in results] == [True, False, True, False]
    assert sampled.rows.keys() == {"short", "one"}
    for key, result in (("short", results[1]), ("one", results[3])):
        expected = logits_of(stock, [*PROMPTS[key], 0], 1)
        torch.testing.assert_close(torch.stack(sampled.rows[key]), expected, atol=1e-4, rtol=0)
        assert result
        assert result.token_id == expected.argmax()


def test_a_second_turn_computes_only_what_is_new(sampled: Sampled):
    stock, runner = make(FAMILIES["llama"]), paged(make(FAMILIES["llama"]))
    scheduler = Scheduler(1, BlockPool(runner.block_count, BLOCK_SIZE), Pacing(256))
    ids: list[int] = []
    for turn in range(3):
        ids += [(turn + 2) * i % 96 for i in range(40)]
        sequence = scheduler.add(GenerationRequest(turn, tuple(ids), NEW_TOKENS, Sampling(temperature=0)))
        assert sequence
        while sequence.completion_tokens < NEW_TOKENS:
            batch = scheduler.next_batch()
            (result,) = runner.step(batch)
            scheduler.retire(batch)
            sequence.token_ids.append(result.token_id)
        scheduler.remove(turn)
        # The last token sampled has no keys and values yet, and half a block is never found.
        assert sequence.cached_tokens == (len(ids) - 40 - (turn > 0)) // BLOCK_SIZE * BLOCK_SIZE
        ids = sequence.token_ids
        whole = logits_of(stock, ids, NEW_TOKENS)
        torch.testing.assert_close(torch.stack(sampled.rows[turn]), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_drawn_tokens_are_the_same_beside_any_neighbours(order: int):
    drawn = [request(key, Sampling(temperature=1.5, top_p=0.95, seed=11)) for key in PROMPTS]
    runner = paged(make(FAMILIES["gemma3"]))
    alone = {r.key: Run(runner, [r]).texts[r.key] for r in drawn}
    assert Run(paged(make(FAMILIES["gemma3"]), blocks=7), drawn[::order]).texts == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_token_and_memory_are_those_of_the_tensors(dtype: torch.dtype):
    model = make(FAMILIES["llama"], dtype)
    layers, keys_and_values, kv_heads, dim = 2, 2, 2, 8
    token_bytes = page(model)[torch.device("cpu")]
    assert token_bytes == layers * keys_and_values * kv_heads * dim * dtype.itemsize
    runner = PagedRunner(model, PagedCache(6, BLOCK_SIZE))
    unique = sum(p.numel() * p.element_size() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert (runner.kv_bytes, runner.memory_bytes) == (0, unique)
    runner.warm_up()
    assert runner.kv_bytes == 6 * BLOCK_SIZE * token_bytes
    assert runner.memory_bytes == unique + runner.kv_bytes


def test_weights_that_are_tied_count_once():
    tied, untied = (make(config(LlamaConfig, tie_word_embeddings=tie)) for tie in (True, False))
    table = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    assert runner_module.weight_bytes(untied) - runner_module.weight_bytes(tied) == table


def test_a_model_whose_layers_move_their_inputs_runs_as_it_does_without():
    stock, spread = (make(FAMILIES["gemma3"]) for _ in range(2))
    # What accelerate does to a model that it spreads over devices; here there is one.
    dispatch_model(spread, {"": "cpu"}, force_hooks=True)
    moved: list[torch.device] = []

    class Watched(Step):
        def to(self, device: Any, non_blocking: bool = False) -> Step:
            moved.append(torch.device(device))
            return super().to(device, non_blocking)

    expected = Run(paged(stock), [request("short"), request("long")]).texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "Step", Watched)
        assert Run(paged(spread), [request("short"), request("long")]).texts == expected
    assert set(moved) == {torch.device("cpu")}


def test_a_step_goes_to_another_device_once_with_all_that_attention_reads():
    slots, blocks = torch.arange(3), torch.tensor([5, 3])
    step = Step(PagedCache(10, BLOCK_SIZE), slots, [Row(0, 2, 2, blocks), Row(2, 3, 30, blocks)])
    there = step.to("meta", non_blocking=True)
    assert there is step.to(torch.device("meta"))
    assert there.to("meta") is there
    assert step.to("cpu") is step
    assert there.cache is step.cache
    assert {there.slots.device.type, *(row.blocks.device.type for row in there._rows)} == {"meta"}
    assert [(row.first, row.last, row.length) for row in there._rows] == [(0, 2, 2), (2, 3, 30)]


def test_warming_up_changes_no_text():
    fresh, warm = paged(make(FAMILIES["llama"])), paged(make(FAMILIES["llama"]))
    expected = Run(fresh, [request("short")]).texts
    warm.warm_up()
    assert Run(warm, [request("short")]).texts == expected


def test_a_step_that_ran_out_of_memory_can_be_asked_for_again(sampled: Sampled):
    stock, runner = make(FAMILIES["mistral with a window"]), paged(make(FAMILIES["mistral with a window"]))
    of_a_cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    of_a_gpu = [torch.OutOfMemoryError("CUDA out of memory"), torch.cuda.OutOfMemoryError("CUDA out of memory")]
    sampled.raises = [*of_a_gpu, RuntimeError(of_a_cpu), MemoryError()]
    run = Run(runner, [request("long"), request("short")])
    assert run.retried == 4
    assert_stock(stock, run, sampled)


def test_another_exception_of_a_step_is_not_taken_for_want_of_memory(sampled: Sampled):
    sampled.raises = [RuntimeError("a kernel failed")]
    with pytest.raises(RuntimeError, match="a kernel failed"):
        Run(paged(make(FAMILIES["llama"])), [request("short")])


def test_a_step_keeps_no_gradients(sampled: Sampled):
    Run(paged(make(FAMILIES["llama"])), [request("short")])
    assert all(row.is_inference() and not row.requires_grad for row in sampled.rows["short"])


# What does not fit.


def without_a_window(model: Any) -> None:
    """A window larger than the probe, which one layer forgets to pass on."""
    model.model.layers[1].self_attn.sliding_window = None


def raising_in_attention(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    own = type(attention).forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        if "step" in options:
            raise ZeroDivisionError("not with me")
        return own(self, *args, **options)

    attention.forward = MethodType(forward, attention)


HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
STATE_SPACE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
CHUNKED = {"num_local_experts": 2, "intermediate_size_mlp": 64}
FAR = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
MISFITS: dict[str, tuple[Config, Callable[[Any], None] | None, str]] = {
    "attention sinks": (
        config(GptOssConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        None,
        "takes more",
    ),
    "a mask of its own": (config(DogeConfig, keep_window_size=8), None, "takes more"),
    "chunked attention": (config(Llama4TextConfig, **CHUNKED, attention_chunk_size=8), None, "differ"),
    "chunks larger than the probe": (
        config(Llama4TextConfig, **CHUNKED, attention_chunk_size=8192, no_rope_layers=[1, 1], attn_temperature_tuning=False),
        None,
        "layers of chunked_attention",
    ),
    "no attention at all": (config(MambaConfig), None, "differ"),
    "state spaces between": (
        config(JambaConfig, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4),
        None,
        "differ|layers of linear_attention",
    ),
    "state spaces beside": (config(FalconH1Config, **STATE_SPACE), None, "differ"),
    "linear attention": (config(Qwen3NextConfig, **HYBRID), None, "differ|layers of linear_attention"),
    "attention of its own": (config(GPTJConfig, GPT_SIZES, n_positions=512, rotary_dim=4), None, "differ"),
    "a step that is not handed on": (config(StableLmConfig), None, "step"),
    "a window that is not handed on": (config(Qwen2Config, **FAR), without_a_window, "tokens back"),
    "an attention that raises": (config(LlamaConfig), raising_in_attention, "^it raises ZeroDivisionError$"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "spoil", "why"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_found_out_and_left_as_it_was(family: Config, spoil: Any, why: str, dtype: torch.dtype):
    model, ids = make(family, dtype), torch.tensor([PROMPTS["long"]])
    if spoil:
        spoil(model)
    own = model.config._attn_implementation
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        with pytest.raises(DoesNotFit, match=why):
            page(model)
        assert model.config._attn_implementation == own
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_window_larger_than_the_probe_is_kept():
    stock, model = (make(config(Qwen2Config, **{**FAR, "sliding_window": 50})) for _ in range(2))
    runner, sequence = paged(model), Sequence(request("long"))
    sequence.blocks = [3, 1, 0, 2]
    rows = runner.forward([Slice(sequence, 0, len(LONG))], list(range(len(LONG))))
    torch.testing.assert_close(rows, logits_of(stock, [*LONG, 0], len(LONG)), atol=1e-4, rtol=0)
