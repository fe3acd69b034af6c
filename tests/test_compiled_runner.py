"""Compiled decode steps against the same steps as they are: one stream alone is compiled, everything else is not."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from LLM.engine import compiled_runner
from LLM.engine.attention import PagedCache
from LLM.engine.compiled_runner import CompiledRunner
from LLM.engine.fuse import fuse
from LLM.engine.fused_modules import PackedLinear, has_fbgemm
from LLM.engine.request import GenerationRequest
from LLM.engine.runner import BLOCK_SIZE, PagedRunner, page, weight_bytes
from LLM.engine.sequence import Sequence, Slice

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
# Windows that end inside the texts below, and norms of heads, are in the second.
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **SIZES),
    "gemma3": partial(Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"], sliding_window=8, **SIZES),
}


def make(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](initializer_range=0.3), dtype=dtype).eval()
    fuse(model)
    page(model)
    return model


def greedy(runner: PagedRunner, prompts: list[tuple[int, ...]], tokens: int) -> tuple[list[list[int]], list[Tensor]]:
    """Prefill the prompts and decode them together; give each one's ids, and every step's logits."""
    sequences = [Sequence(GenerationRequest(i, prompt, tokens)) for i, prompt in enumerate(prompts)]
    for i, sequence in enumerate(sequences):
        sequence.blocks = [2 * len(sequences) - i, i, 40 + i, 50 + i]
    steps = []
    for _ in range(tokens):
        batch = [Slice(s, s.computed, len(s.token_ids)) for s in sequences]
        ends = torch.tensor([part.stop - part.start for part in batch]).cumsum(0) - 1
        steps.append(runner.forward(batch, ends.tolist()))
        for part, row in zip(batch, steps[-1], strict=True):
            part.sequence.computed = part.stop
            part.sequence.token_ids.append(int(row.argmax()))
    return [s.completion_ids for s in sequences], steps


Counted = Callable[[Callable[[], Any]], tuple[Any, int]]


class Calls:
    """Counts how often a runner's graph is called."""

    def __init__(self, runner: CompiledRunner) -> None:
        self.count = 0
        self._graph = runner._compiled
        runner._compiled = self

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.count += 1
        return self._graph(*inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stream_alone_is_decoded_by_the_graph_and_gets_the_same_logits(name: str):
    model = make(name)
    plain = PagedRunner(model, PagedCache(64, BLOCK_SIZE))
    compiled = CompiledRunner(model, PagedCache(64, BLOCK_SIZE))
    assert compiled.notes == []
    calls = Calls(compiled)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Texts of several lengths, one across a border of blocks, through one graph.
    for length in (1, 5, 30):
        prompt = tuple(7 * i % 96 for i in range(length))
        expected, steps = greedy(plain, [prompt], 20)
        found, others = greedy(compiled, [prompt], 20)
        assert found == expected
        torch.testing.assert_close(torch.cat(others), torch.cat(steps), atol=1e-4, rtol=1e-4)
    # A prompt of one token is a step of one token too.
    assert calls.count == 20 + 19 + 19
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    # Several at once, and prompts, go the usual way.
    calls.count = 0
    prompts = [(1, 2, 3), (4,), (5, 6)]
    assert greedy(compiled, prompts, 10)[0] == greedy(plain, prompts, 10)[0]
    assert calls.count == 0


def test_models_beside_each_other_are_decoded_by_their_own_graphs():
    models = [make("llama"), make("gemma3"), make("llama", seed=6)]
    plain = [PagedRunner(model, PagedCache(64, BLOCK_SIZE)) for model in models]
    compiled = [CompiledRunner(model, PagedCache(64, BLOCK_SIZE)) for model in models]
    assert [runner.notes for runner in compiled] == [[], [], []]
    expected = [greedy(runner, [(1, 2, 3)], 20)[0] for runner in plain]
    assert expected[0] != expected[2]
    for _ in range(2):
        assert [greedy(runner, [(1, 2, 3)], 20)[0] for runner in compiled] == expected


@pytest.fixture
def fbgemm() -> Counted:
    """Gives what a call returns, and how many products FBGEMM made in it."""
    if not (has_fbgemm() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("this CPU or this torch has no FBGEMM or no bfloat16")

    def counted(call: Callable[[], Any]) -> tuple[Any, int]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = call()
        return result, sum(event.name == "_quantized::wrapped_fbgemm_linear_fp16_weight" for event in seen.events())

    return counted


@pytest.mark.parametrize("name", CONFIGS)
def test_one_row_of_a_bfloat16_model_is_multiplied_by_fbgemm(name: str, fbgemm: Counted):
    model = make(name, torch.bfloat16)
    plain = PagedRunner(make(name, torch.bfloat16), PagedCache(64, BLOCK_SIZE))
    compiled = CompiledRunner(model, PagedCache(64, BLOCK_SIZE))
    assert compiled.notes == []
    # All but the embeddings and the norms, once more.
    packed = [part for part in model.modules() if isinstance(part, PackedLinear)]
    held = sum(part.weight.nbytes for part in packed)
    assert compiled.memory_bytes - compiled.kv_bytes == pytest.approx(weight_bytes(model) + held, rel=0.01)
    for prompts, products in ([(5,)], len(packed)), ([(5, 6), (7,)], 0), ([(5, 6)], 1):
        (_, expected), none = fbgemm(lambda p=prompts: greedy(plain, p, 1))
        (_, found), count = fbgemm(lambda p=prompts: greedy(compiled, p, 1))
        torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)
        # Of a prompt alone, only the last token reaches the output layer.
        assert (none, count) == (0, products)


@pytest.mark.parametrize("bias", [None, torch.linspace(-2, 2, 48).bfloat16()], ids=["plain", "bias"])
def test_both_forms_of_a_weight_give_the_same(bias: Tensor | None, fbgemm: Counted):
    torch.manual_seed(1)
    # Down to numbers that float16 holds as 0.
    weight = (torch.randn(48, 32) * torch.logspace(-9, 0, 32)).bfloat16()
    layer, hidden = PackedLinear(weight, bias), torch.randn(1, 1, 32).bfloat16()
    expected = layer(hidden)
    assert layer.pack_for_one_row() == weight.nbytes
    found, products = fbgemm(lambda: layer(hidden))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert products == 1
    layer.forget_one_row()
    found, products = fbgemm(lambda: layer(hidden))
    assert torch.equal(found, expected)
    assert products == 0


def test_a_weight_that_float16_cannot_hold_or_that_holds_more_digits_stays_alone(
    fbgemm: Counted,
):
    large = torch.randn(48, 32).bfloat16()
    large[3, 4] = 1e5
    for weight in (large, torch.randn(48, 32)):
        layer, hidden = PackedLinear(weight, None), torch.randn(1, 1, 32).to(weight.dtype)
        assert layer.pack_for_one_row() == 0
        found, products = fbgemm(lambda layer=layer, hidden=hidden: layer(hidden))
        torch.testing.assert_close(found, hidden @ weight.T)
        assert products == 0


def raising(*arguments: Any, **options: Any) -> Any:
    """Compile as torch does where there is no C++ compiler."""

    def run(*inputs: Tensor) -> Tensor:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

    return run


def wrong(*arguments: Any, **options: Any) -> Any:
    """Compile to something else."""
    return lambda *inputs: torch.ones(1, 1, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("compile", "name"), [(raising, "RuntimeError"), (wrong, "ValueError")])
def test_a_model_that_cannot_be_compiled_or_not_rightly_is_decoded_eagerly_and_that_is_told(
    compile: Callable[..., Any],
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(compiled_runner.torch, "compile", compile)
    model = make(dtype=dtype)
    with caplog.at_level(logging.WARNING):
        runner = CompiledRunner(model, PagedCache(64, BLOCK_SIZE))
    assert runner.notes == [f"decodes eagerly: compiling it raised {name}"]
    assert not any(part._one_row for part in model.modules() if isinstance(part, PackedLinear))
    assert runner.memory_bytes == weight_bytes(model) + runner.kv_bytes
    assert "could not be compiled" in caplog.text
    plain = PagedRunner(model, PagedCache(64, BLOCK_SIZE))
    assert greedy(runner, [(1, 2, 3)], 10)[0] == greedy(plain, [(1, 2, 3)], 10)[0]
