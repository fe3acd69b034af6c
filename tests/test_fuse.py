"""Fused models against themselves before: what they compute stays, what does not fit is left alone, no memory is doubled."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from LLM.engine import fuse as fuse_module
from LLM.engine.fuse import Merged, PackedLinear, Part, Undo, fuse, fuse_norms, fuse_projections, fuse_weights

LAYERS = 2
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **SIZES),
    "mistral": partial(MistralConfig, sliding_window=8, **SIZES),
    "qwen2": partial(Qwen2Config, **SIZES),  # query, key and value have biases, the rest has none
    "qwen3": partial(Qwen3Config, **SIZES),
    "gemma3": partial(Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"], sliding_window=8, **SIZES),
}
# Two norms a layer and the last one; Gemma 3 has four, and like Qwen 3 one each for queries and keys.
NORMS = {"llama": 2 * LAYERS + 1, "mistral": 2 * LAYERS + 1, "qwen2": 2 * LAYERS + 1, "qwen3": 4 * LAYERS + 1}
NORMS["gemma3"] = 6 * LAYERS + 1
FUSIONS = {"norms": fuse_norms, "projections": fuse_projections, "weights": fuse_weights}
# What is rounded elsewhere shows in bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These models are so small that two threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Make a random model whose norms have weights of their own too."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](initializer_range=0.3, **changes), dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    return model


@torch.inference_mode()
def logits(model: Any, tokens: int = 23) -> Tensor:
    """Give float32 logits for two texts at once."""
    ids = torch.arange(2 * tokens).view(2, tokens) * 7 % SIZES["vocab_size"]
    return model(input_ids=ids, use_cache=False).logits.float()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def memory(model: Any) -> int:
    """Give the bytes of the storages behind a model's weights; those in oneDNN's order have none that could be asked."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_mkldnn}
    packed = {id(t): t.numel() * t.element_size() for t in tensors if t.is_mkldnn}
    return sum(plain.values()) + sum(packed.values())


def count(model: Any, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_fusion_keeps_every_familys_logits_and_can_be_undone(name: str, fusion: str, dtype: torch.dtype):
    model = make(name, dtype)
    expected = {tokens: logits(model, tokens) for tokens in (1, 23)}
    modules = {path: type(module) for path, module in model.named_modules()}
    undo = FUSIONS[fusion](model)
    assert undo
    assert modules != {path: type(module) for path, module in model.named_modules()}
    for tokens, before in expected.items():
        assert difference(logits(model, tokens), before) < TOLERANCE[dtype]
    for step in reversed(undo):
        step()
    assert modules == {path: type(module) for path, module in model.named_modules()}
    assert all(torch.equal(logits(model, tokens), before) for tokens, before in expected.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_all_norms_and_projections_of_the_known_families_fit(name: str):
    model = make(name)
    norms = len(fuse_norms(model))
    assert norms == count(model, nn.RMSNorm) == NORMS[name]
    fuse_projections(model)
    assert count(model, Merged) == 2 * LAYERS
    assert count(model, Part) == 5 * LAYERS
    assert count(model, nn.Linear) == 4 * LAYERS + 1  # merged, merged, o_proj, down_proj; and the output layer


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_cpu_projections_and_weights_are_fused(name: str, dtype: torch.dtype):
    model = make(name, dtype)
    expected = logits(model)
    assert fuse(model) == ("projections", "weights")
    assert count(model, PackedLinear) == 4 * LAYERS + 1
    assert count(model, nn.Linear) == 0
    assert difference(logits(model), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("tied", [True, False])
def test_no_weight_takes_memory_twice_but_a_tied_embedding(tied: bool):
    model = make("llama", tie_word_embeddings=tied)
    before = memory(model)
    old = [weakref.ref(parameter) for parameter in model.parameters() if parameter.ndim == 2]
    fuse(model)
    gc.collect()
    embedding = model.get_input_embeddings().weight
    assert [ref() for ref in old if ref() is not None and ref() is not embedding] == []
    assert memory(model) - before == (embedding.nbytes if tied else 0)


@pytest.mark.parametrize("name", ["PackedLinear", "Merged"])
def test_old_weights_go_one_layer_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    model = make("llama", num_hidden_layers=6, tie_word_embeddings=False)
    largest = max(parameter.nbytes for parameter in model.parameters()) * 3
    whole = memory(model)
    old = {weakref.ref(p): p.nbytes for module in model.modules() if type(module) is nn.Linear for p in module.parameters()}
    made = 0

    class Watched(getattr(fuse_module, name)):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            nonlocal made
            alive = sum(size for ref, size in old.items() if ref() is not None)
            assert alive + made <= whole + largest
            super().__init__(*arguments)
            made += sum(t.numel() * t.element_size() for t in [*self.parameters(), *self.buffers()])

    monkeypatch.setattr(fuse_module, name, Watched)
    (fuse_weights if name == "PackedLinear" else fuse_projections)(model)
    assert made > whole / 2


def wrong(model: Any) -> list[Undo]:
    """Change what the model says."""
    model.lm_head.weight.data.mul_(1.5)
    return [partial(model.lm_head.weight.data.div_, 1.5)]


def broken(model: Any) -> list[Undo]:
    """Give the model a layer that cannot take its input."""
    head, model.lm_head = model.lm_head, nn.Linear(3, 3)
    return [partial(setattr, model, "lm_head", head)]


@pytest.mark.parametrize(("fusion", "said"), [(wrong, "change the model's logits"), (broken, "does not run with")])
def test_a_wrong_fusion_is_undone_and_said_and_the_next_one_tried(
    fusion: Callable[[Any], list[Undo]], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(fuse_module, "ON_CPU", {"guesses": fusion, "projections": fuse_projections})
    model = make("mistral", tie_word_embeddings=False)
    expected = logits(model)
    with caplog.at_level(logging.WARNING):
        assert fuse(model) == ("projections",)
    assert said in caplog.text
    assert difference(logits(model), expected) < 1e-5


def test_a_model_of_another_structure_keeps_it():
    torch.manual_seed(5)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes), dtype=torch.float32).eval()
    expected = logits(model)
    assert fuse(model) == ("weights",)  # of the output layer; the others are no linear layers
    assert count(model, PackedLinear) == 1
    assert difference(logits(model), expected) < 1e-5


class Quantised(nn.Linear):
    """A linear layer that computes otherwise."""


def of_another_class(mlp: Any) -> None:
    mlp.gate_proj = Quantised(32, 48, bias=False)


def of_another_dtype(mlp: Any) -> None:
    mlp.gate_proj = mlp.gate_proj.double()


def of_another_width(mlp: Any) -> None:
    mlp.gate_proj = nn.Linear(16, 48, bias=False)


def with_a_bias_only_here(mlp: Any) -> None:
    mlp.gate_proj = nn.Linear(32, 48)


def hooked(mlp: Any) -> None:
    mlp.gate_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def with_a_forward_of_its_own(mlp: Any) -> None:
    mlp.gate_proj.forward = lambda hidden: hidden @ mlp.gate_proj.weight.T * 2


@pytest.mark.parametrize(
    "change",
    [of_another_class, of_another_dtype, of_another_width, with_a_bias_only_here, hooked, with_a_forward_of_its_own],
)
def test_linear_layers_that_are_not_alike_are_not_merged(change: Callable[[Any], None]):
    model = make("llama")
    change(model.model.layers[1].mlp)
    kept = model.model.layers[1].mlp.gate_proj
    fuse_projections(model)
    assert count(model, Merged) == 2 * LAYERS - 1
    assert model.model.layers[1].mlp.gate_proj is kept


@pytest.mark.parametrize("change", [of_another_class, of_another_dtype, hooked, with_a_forward_of_its_own])
def test_layers_that_are_not_plain_are_not_packed(change: Callable[[Any], None]):
    model = make("llama")
    change(model.model.layers[1].mlp)
    kept = model.model.layers[1].mlp.gate_proj
    fuse_weights(model)
    assert count(model, PackedLinear) == 7 * LAYERS
    assert model.model.layers[1].mlp.gate_proj is kept


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_without_the_operations_for_it_nothing_is_packed(missing: str, monkeypatch: pytest.MonkeyPatch):
    there = {name: getattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")}
    del there[missing]
    monkeypatch.setattr(fuse_module.torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace(**there)))
    assert fuse_weights(make("llama")) == []


class CentredRMSNorm(nn.Module):
    """A norm by name and parameters, but another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.eps = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.layer_norm(hidden, (32,), self.weight, None, self.eps)


class DistantRMSNorm(CentredRMSNorm):
    """A norm that adds something else than its epsilon says."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.rms_norm(hidden, (32,), self.weight, 3 * self.eps)


@pytest.mark.parametrize("kind", [CentredRMSNorm, DistantRMSNorm])
def test_a_norm_that_only_looks_like_one_is_kept(kind: type[nn.Module]):
    model = make("llama")
    model.model.norm = kind()
    fuse_norms(model)
    assert count(model, kind) == 1
    assert count(model, nn.RMSNorm) == 2 * LAYERS


@pytest.mark.parametrize("bias", [True, False])
def test_merged_layers_called_in_any_order_with_any_input_give_their_own_products(bias: bool):
    torch.manual_seed(5)
    linears = [nn.Linear(6, size, bias) for size in (4, 2, 3)]
    expected = [partial(nn.functional.linear, weight=m.weight.clone(), bias=m.bias) for m in linears]
    merged = Merged(linears)
    one, other = torch.randn(2, 5, 6)
    calls = [
        (0, one),
        (1, one),
        (2, one),
        (2, one),
        (0, other),
        (1, one),
        (2, other),
        (1, other),
        (0, one),
        (0, one.clone()),
    ]
    for index, hidden in calls:
        torch.testing.assert_close(merged.part(index, hidden), expected[index](hidden))


def test_merged_layers_are_computed_once_and_keep_nothing(monkeypatch: pytest.MonkeyPatch):
    merged = Merged([nn.Linear(6, size) for size in (4, 2, 3)])
    calls = []
    merged.linear.register_forward_hook(lambda module, inputs, output: calls.append(weakref.ref(output)))
    hidden = torch.randn(5, 6)
    alive = weakref.ref(hidden)
    for index in range(3):
        merged.part(index, hidden)
    assert len(calls) == 1
    del hidden
    assert alive() is None
    assert calls[0]() is None
