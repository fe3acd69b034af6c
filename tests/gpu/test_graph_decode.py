"""Decode in CUDA graphs against eager decode and `model.generate`, token by token, with cancels in between."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from LLM.engine.attention import PagedCache
from LLM.engine.fuse import fuse
from LLM.engine.runner import BLOCK_SIZE, PagedRunner, page
from LLM.engine.sequence import Slice

pytest.importorskip("triton", reason="the decode kernel needs Triton, which there is for Linux alone")

from LLM.engine import graph_decode
from LLM.engine.decode_layers import fuse_layers
from LLM.engine.graph_decode import GraphDecoder, Recording
from tests.test_graph_decode import BLOCKS, CANCELLED_AFTER, PROMPTS, SIZES, WINDOWS, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LARGER = SIZES | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
CONFIGS = {
    "llama": functools.partial(LlamaConfig, **LARGER),
    "mistral with a window": functools.partial(MistralConfig, sliding_window=8, **LARGER),
    "qwen3": functools.partial(Qwen3Config, **LARGER),
    "gemma3": functools.partial(Gemma3TextConfig, **WINDOWS, **LARGER),
}
NEW_TOKENS = 40
CAPACITY = 3


@pytest.fixture(autouse=True)
def _few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_decode, "SIZES", [64, 4, 2, 1])


@pytest.fixture(autouse=True)
def _exact() -> Any:
    # Ties between tokens are to be decided alike everywhere.
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def make(name: str) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval().to("cuda")


def paged(model: Any) -> tuple[PagedRunner, PagedCache]:
    page(model)
    cache = PagedCache(BLOCKS + 1, BLOCK_SIZE)
    runner = PagedRunner(model, cache)
    runner.warm_up()
    return runner, cache


def recorded(runner: PagedRunner, cache: PagedCache, model: Any) -> GraphDecoder:
    decoder = GraphDecoder(model, cache, trash_block=BLOCKS, capacity=CAPACITY, blocks=8)
    decoder.check(runner.forward)
    return decoder


@torch.inference_mode()
def own(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt], device="cuda")
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_give_the_tokens_of_eager_steps_and_of_the_models_own_generate(name: str, fused: bool):
    model = make(name)
    expected = {key: own(model, prompt) for key, prompt in PROMPTS.items()}
    if fused:
        assert fuse(model) == ("norms", "attention", "MLPs")
    runner, cache = paged(model)
    eager, _ = generate(runner, None, NEW_TOKENS, None)
    if fused:
        assert fuse_layers(model, runner.warm_up) == (0 if name == "gemma3" else 2)
    decoder = recorded(runner, cache, model)
    assert decoder.note is None
    graphs, steps = generate(runner, decoder, NEW_TOKENS, None)
    assert steps > NEW_TOKENS
    assert graphs == eager == expected


@pytest.mark.parametrize("cancelled", PROMPTS)
def test_a_cancel_in_the_middle_changes_nothing_for_the_others(cancelled: str):
    model = make("llama")
    runner, cache = paged(model)
    whole, _ = generate(runner, None, NEW_TOKENS, None)
    rest, _ = generate(runner, recorded(runner, cache, model), NEW_TOKENS, cancelled)
    assert rest == whole | {cancelled: whole[cancelled][:CANCELLED_AFTER]}


def test_a_decoder_does_not_notice_another_models_steps_between_its_own():
    model, other = make("llama"), make("qwen3")
    runner, cache = paged(model)
    eager, _ = generate(runner, None, NEW_TOKENS, None)
    decoder, (beside, _) = recorded(runner, cache, model), paged(other)

    class Interrupted:
        takes = decoder.takes

        def forward(self, batch: list[Slice], in_flight: dict) -> torch.Tensor:
            logits = decoder.forward(batch, in_flight)
            beside.warm_up()
            return logits

    assert generate(runner, Interrupted(), NEW_TOKENS, None)[0] == eager


def without_memory(largest: int, record: Callable[..., Recording]) -> Callable[..., Recording]:
    def limited(run: Callable[[], torch.Tensor], pool: Any) -> Recording:
        if len(run()) > largest:  # slices
            torch.empty(2**50, device="cuda")
        return record(run, pool)

    return limited


def test_without_memory_for_large_graphs_there_are_small_ones(monkeypatch: pytest.MonkeyPatch):
    model = make("llama")
    runner, cache = paged(model)
    eager, _ = generate(runner, None, NEW_TOKENS, None)
    monkeypatch.setattr(graph_decode, "record", without_memory(2, graph_decode.record))
    decoder = recorded(runner, cache, model)
    assert decoder.sizes == (1, 2)
    assert decoder.note == "no CUDA graphs for batches of 4 (out of memory), 64 (out of memory)"
    graphs, steps = generate(runner, decoder, NEW_TOKENS, None)
    assert graphs == eager
    assert steps > 0


def test_a_model_that_waits_for_its_device_has_no_graphs_but_goes_on():
    model = make("llama")
    runner, cache = paged(model)
    eager, _ = generate(runner, None, NEW_TOKENS, None)
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * float(output.isfinite().all()))
    decoder = recorded(runner, cache, model)
    assert decoder.sizes == ()
    assert decoder.note is not None
    assert generate(runner, decoder, NEW_TOKENS, None) == (eager, 0)
