"""Which layers get kernels of their own, and that this changes nothing but decode steps; those are in test_graph_decode."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from LLM.engine.attention import PagedCache
from LLM.engine.fuse import ON_GPU
from LLM.engine.request import GenerationRequest
from LLM.engine.runner import BLOCK_SIZE, PagedRunner, page
from LLM.engine.sequence import Sequence, Slice
from tests.test_graph_decode import SIZES

pytest.importorskip("triton", reason="the kernels need Triton, which there is for Linux alone")

from LLM.engine.decode_layers import DecodeLayer, fuse_layers

CONFIGS = {
    "llama": partial(LlamaConfig, **SIZES),
    "qwen3": partial(Qwen3Config, **SIZES),
    "with biases": partial(Qwen2Config, **SIZES),
    "with another gate": partial(LlamaConfig, hidden_act="gelu", **SIZES),
}
FIT = {"llama": 2, "qwen3": 2, "with biases": 0, "with another gate": 0}


def made(name: str) -> tuple[Any, PagedRunner]:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        assert all(list(fusion(model)) for fusion in ON_GPU.values())
    page(model)
    return model, PagedRunner(model, PagedCache(4, BLOCK_SIZE))


def logits(runner: PagedRunner) -> Tensor:
    sequence = Sequence(GenerationRequest("key", tuple(range(20)), 1), blocks=[2, 0])
    return runner.forward([Slice(sequence, 0, 20)], [19])


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_fit_are_swapped_and_do_in_other_steps_what_they_did(name: str):
    model, runner = made(name)
    before = logits(runner)
    assert fuse_layers(model, runner.warm_up) == FIT[name]
    assert sum(isinstance(module, DecodeLayer) for module in model.modules()) == FIT[name]
    assert torch.equal(logits(runner), before)


def test_a_layer_that_adds_up_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, **named: x + 0.9 * (forward(self, x, **named) - x))
    model, runner = made("llama")
    assert fuse_layers(model, runner.warm_up) == 0


def test_a_layer_with_a_hook_is_left_alone():
    model, runner = made("llama")
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output)
    assert fuse_layers(model, runner.warm_up) == 1


def test_what_a_model_asks_of_its_layers_is_there():
    model, runner = made("llama")
    model.model.layers[0].attention_type = "full_attention"
    fuse_layers(model, runner.warm_up)
    assert model.model.layers[0].attention_type == "full_attention"
