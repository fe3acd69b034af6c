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
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention

from LLM.engine import fuse as fuse_module
from LLM.engine.fuse import Undo, fuse, fuse_attention, fuse_mlps, fuse_norms, fuse_weights
from LLM.engine.fused_modules import SMALL, FusedAttention, GatedMLP, HeadNorm, PackedLinear, RMSNorm
from LLM.engine.packing import packs

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
WINDOWS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **SIZES),
    "mistral": partial(MistralConfig, sliding_window=8, **SIZES),
    "qwen2": partial(Qwen2Config, **SIZES),  # query, key and value have biases, the rest has none
    "qwen3": partial(Qwen3Config, **SIZES),
    "gemma2": partial(Gemma2Config, attn_logit_softcapping=1.5, **WINDOWS, **SIZES),
    "gemma3": partial(Gemma3TextConfig, **WINDOWS, **SIZES),
    "olmo2": partial(Olmo2Config, **SIZES),  # one norm for the queries of all heads, and one for the keys
}
# Two norms a layer and the last one; Gemma has four, and Qwen 3, Gemma 3 and OLMo 2 one each for queries and keys.
NORMS = dict.fromkeys(CONFIGS, 2 * LAYERS + 1) | dict.fromkeys(("qwen3", "gemma2", "olmo2"), 4 * LAYERS + 1)
NORMS["gemma3"] = 6 * LAYERS + 1
HEAD_NORMS = {"qwen3", "gemma3"}
FUSIONS = {"norms": fuse_norms, "attention": fuse_attention, "MLPs": fuse_mlps, "weights": fuse_weights}
FITTING = {name: tuple(FUSIONS) for name in CONFIGS} | {"olmo2": ("norms", "MLPs", "weights")}


def fitting(name: str, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """What fits a family on this CPU, which may have no instructions for 16-bit types."""
    return tuple(fusion for fusion in FITTING[name] if fusion != "weights" or packs(dtype))


# What is rounded elsewhere shows in bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
LISTENING = "tests_listening"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These models are so small that two threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Listening:
    """An attention function with windows and soft caps, that keeps what else the layers tell it."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        self.heard.append({"layer": module.layer_idx, "causal": module.is_causal, **given})
        output, weights = eager_attention_forward(module, query, key, value, mask, **given)
        return output, weights


listening = Listening()
AttentionInterface.register(LISTENING, listening)
AttentionMaskInterface.register(LISTENING, eager_mask)


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Make a random model whose norms have weights of their own too."""
    return randomised(CONFIGS[name](initializer_range=0.3, **changes), dtype)


def randomised(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    if config.model_type == "gemma2":
        model.set_attn_implementation(LISTENING)  # by itself it takes a function of its own, because no other has soft caps
    return model


@torch.inference_mode()
def logits(model: Any, tokens: int = 23) -> Tensor:
    """Give float32 logits for two texts at once."""
    ids = torch.arange(2 * tokens).view(2, tokens) * 7 % SIZES["vocab_size"]
    return model(input_ids=ids, use_cache=False).logits.float()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def memory(model: Any) -> int:
    """Give the bytes of the storages behind a model's matrices; those in oneDNN's order have none that could be asked."""
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.ndim == 2]
    plain = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_mkldnn}
    packed = {id(t): t.numel() * t.element_size() for t in tensors if t.is_mkldnn}
    return sum(plain.values()) + sum(packed.values())


def count(model: Any, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize(
    ("name", "fusion", "dtype"),
    [(name, fusion, d) for d in TOLERANCE for name in FITTING for fusion in fitting(name, d)],
    ids=str,
)
def test_every_fusion_keeps_every_familys_logits_and_can_be_undone(name: str, fusion: str, dtype: torch.dtype):
    model = make(name, dtype)
    expected = {tokens: logits(model, tokens) for tokens in (1, 23)}
    modules = {path: type(module) for path, module in model.named_modules()}
    undo = list(FUSIONS[fusion](model))
    assert undo
    assert modules != {path: type(module) for path, module in model.named_modules()}
    for tokens, before in expected.items():
        assert difference(logits(model, tokens), before) < TOLERANCE[dtype]
    for step in reversed(undo):
        step()
    assert modules == {path: type(module) for path, module in model.named_modules()}
    assert all(torch.equal(logits(model, tokens), before) for tokens, before in expected.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_all_norms_attention_and_mlps_of_the_known_families_fit(name: str):
    model = make(name)
    fits, head_norms = "attention" in FITTING[name], 2 * LAYERS if name in HEAD_NORMS else 0
    assert len(list(fuse_norms(model))) == count(model, RMSNorm) == NORMS[name]
    assert len(list(fuse_attention(model))) == count(model, FusedAttention) == fits * LAYERS
    # The norms of queries and of keys are one now.
    assert count(model, RMSNorm) == NORMS[name] - head_norms
    assert count(model, HeadNorm) == head_norms / 2
    assert len(list(fuse_mlps(model))) == count(model, GatedMLP) == LAYERS
    # Merged, o_proj, merged, down_proj; and the output layer.
    assert count(model, nn.Linear) == (4 if fits else 6) * LAYERS + 1


@pytest.mark.parametrize("name", sorted(HEAD_NORMS))
def test_norms_of_heads_are_fused_with_their_attention_alone_too(name: str):
    model = make(name)
    expected = logits(model)
    list(fuse_attention(model))
    assert count(model, HeadNorm) == LAYERS
    assert len(list(fuse_norms(model))) == count(model, RMSNorm) == NORMS[name] - 2 * LAYERS
    assert difference(logits(model), expected) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_cpu_everything_is_fused(name: str, dtype: torch.dtype):
    model = make(name, dtype)
    own, modes = model.config._attn_implementation, {module: module.training for module in model.modules()}
    expected = logits(model)
    assert fuse(model) == fitting(name, dtype)
    linears = (4 if "attention" in FITTING[name] else 6) * LAYERS + 1
    assert count(model, PackedLinear) == (linears if packs(dtype) else 0)
    assert count(model, nn.Linear) == linears - count(model, PackedLinear)
    assert difference(logits(model), expected) < TOLERANCE[dtype]
    assert model.config._attn_implementation == own
    assert not any(modes.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_model_generates_the_same_with_the_models_own_cache(name: str):
    model = make(name)
    prompt = torch.arange(22).view(2, 11) * 7 % SIZES["vocab_size"]
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(prompt)
    expected = model.generate(prompt, **settings)
    assert fuse(model) == FITTING[name]
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert expected.shape == (2, 35)


@pytest.mark.parametrize("name", [name for name, fitting in FITTING.items() if "attention" in fitting])
def test_fused_attention_tells_the_attention_function_what_the_model_does(name: str):
    model = make(name)
    model.set_attn_implementation(LISTENING)

    def heard() -> list[dict[str, Any]]:
        listening.heard.clear()
        logits(model)
        return [*listening.heard]

    expected = heard()
    windows = {"mistral": [8, 8], "gemma2": [8, None], "gemma3": [8, None]}.get(name, [None, None])
    assert [call.get("sliding_window") for call in expected] == windows
    assert [call.get("softcap") for call in expected] == ([1.5, 1.5] if name == "gemma2" else [None, None])
    assert [call["layer"] for call in expected] == [0, 1]
    assert list(fuse_attention(model))
    found = heard()
    # Some attention takes the positions for itself; no attention function needs them.
    for call in (*found, *expected):
        call.pop("position_ids", None)
    assert found == expected


def test_what_the_caller_tells_the_attention_function_comes_first():
    model = make("mistral")
    model.set_attn_implementation(LISTENING)
    assert list(fuse_attention(model))
    listening.heard.clear()
    mark = object()
    with torch.inference_mode():
        model(input_ids=torch.arange(5)[None], use_cache=False, mark=mark, sliding_window=3)
    assert [(call["mark"], call["sliding_window"]) for call in listening.heard] == [(mark, 3)] * LAYERS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_no_weight_takes_memory_twice_but_a_tied_embedding(name: str, tied: bool):
    model = make(name, tie_word_embeddings=tied)
    before = memory(model)
    old = [weakref.ref(parameter) for parameter in model.parameters() if parameter.ndim == 2]
    fuse(model)
    gc.collect()
    embedding = model.get_input_embeddings().weight
    assert [ref() for ref in old if ref() is not None and ref() is not embedding] == []
    assert memory(model) - before == (embedding.nbytes if tied else 0)


def test_merged_weights_take_no_memory_beside_those_of_the_layers_they_came_from():
    model = make("llama")
    before = memory(model)
    undo = [*fuse_attention(model), *fuse_mlps(model)]
    assert memory(model) == before
    for step in reversed(undo):
        step()
    assert memory(model) == before


@pytest.mark.parametrize("fusion", ["attention", "MLPs", "weights"])
def test_old_weights_go_one_layer_at_a_time(fusion: str, monkeypatch: pytest.MonkeyPatch):
    model = make("llama", num_hidden_layers=6, tie_word_embeddings=False)
    largest = max(parameter.nbytes for parameter in model.parameters()) * 3
    whole = memory(model)
    old = {weakref.ref(p): p.nbytes for module in model.modules() if type(module) is nn.Linear for p in module.parameters()}
    made, calls = 0, 0
    function = {"weights": "PackedLinear"}.get(fusion, "_merge")
    make_layer = getattr(fuse_module, function)

    def watched(*arguments: Any) -> Any:
        nonlocal made, calls
        alive = sum(size for ref, size in old.items() if ref() is not None)
        assert alive + made <= whole + largest
        layer = make_layer(*arguments)
        made += sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
        calls += 1
        return layer

    monkeypatch.setattr(fuse_module, function, watched)
    undo = list(FUSIONS[fusion](model))
    assert calls == len(undo) == (7 * 6 + 1 if fusion == "weights" else 6)
    # Without what was merged, there is less to keep alive.
    assert made > whole / 6
    assert sum(size for ref, size in old.items() if ref() is not None) <= whole - made


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
    monkeypatch.setattr(fuse_module, "ON_CPU", {"guesses": fusion, "attention": fuse_attention})
    model = make("mistral", tie_word_embeddings=False)
    expected = logits(model)
    with caplog.at_level(logging.WARNING):
        assert fuse(model) == ("attention",)
    assert said in caplog.text
    assert difference(logits(model), expected) < 1e-5


@torch.inference_mode()
def far_logits(model: Any) -> Tensor:
    """Give float32 logits of a text at the end of what the model knows."""
    last = SIZES["max_position_embeddings"]
    ids = torch.arange(23)[None] * 7 % SIZES["vocab_size"]
    return model(input_ids=ids, position_ids=torch.arange(last - 23, last)[None], use_cache=False).logits.float()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_attention_that_differs_only_far_from_the_start_is_kept(beta: float, spread: float, dtype: torch.dtype):
    ropes = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 256,
        "llama_4_scaling_beta": beta,
    }
    model = randomised(Ministral3Config(initializer_range=spread, rope_parameters=ropes, **SIZES), dtype)
    near, far = logits(model), far_logits(model)
    # Far from the start alone, the queries are scaled.
    assert fuse(model) == tuple(fusion for fusion in fitting("mistral", dtype) if beta == 0 or fusion != "attention")
    assert count(model, FusedAttention) == (LAYERS if beta == 0 else 0)
    assert difference(logits(model), near) < TOLERANCE[dtype]
    assert difference(far_logits(model), far) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_attention_that_turns_other_pairs_is_kept_however_little_it_shows(spread: float, dtype: torch.dtype):
    model = randomised(CohereConfig(initializer_range=spread, **SIZES), dtype)
    assert list(fuse_attention(model)) == []


ROPES: list[dict[str, Any]] = [
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    {"rope_type": "yarn", "factor": 8.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_positions_that_depend_on_the_length_are_what_they_were_after_the_check(rope: dict[str, Any]):
    original = {} if rope["rope_type"] == "dynamic" else {"original_max_position_embeddings": 64}
    model = make("llama", rope_parameters={"rope_theta": 1e4, **rope, **original})
    near, far = logits(model), far_logits(model)
    assert fuse(model) == FITTING["llama"]
    assert difference(logits(model), near) < 1e-5
    assert difference(far_logits(model), far) < 1e-5


def test_attention_of_the_familys_own_function_is_kept():
    model = make("llama")
    model.set_attn_implementation("eager")
    expected = logits(model)
    assert fuse(model) == ("norms", "MLPs", "weights")
    assert count(model, LlamaAttention) == LAYERS
    assert difference(logits(model), expected) < 1e-5


class OddAttention(LlamaAttention):
    """Attention that splits into other heads than it says."""

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        said, self.head_dim = self.head_dim, SIZES["head_dim"]
        try:
            return super().forward(*arguments, **settings)
        finally:
            self.head_dim = said


class SinkingAttention(LlamaAttention):
    """Attention whose function gets one tensor more."""

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        return super().forward(*arguments, s_aux=torch.zeros(4), **settings)


class SilentAttention(LlamaAttention):
    """Attention that never calls an attention function."""

    def forward(self, hidden_states: Tensor, **settings: Any) -> Any:
        return hidden_states * 2, None


def with_a_parameter(attention: Any) -> None:
    attention.sinks = nn.Parameter(torch.zeros(4))


def with_another_child(attention: Any) -> None:
    attention.gate = nn.Identity()


def with_a_norm_of_queries_alone(attention: Any) -> None:
    attention.q_norm = nn.RMSNorm(8)


def with_head_norms_of_another_kind(attention: Any) -> None:
    attention.q_norm, attention.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)


def with_head_norms_of_two_epsilons(attention: Any) -> None:
    attention.q_norm, attention.k_norm = nn.RMSNorm(8, 1e-5), nn.RMSNorm(8, 1e-6)


def with_a_head_norm_for_all_heads(attention: Any) -> None:
    attention.q_norm, attention.k_norm = nn.RMSNorm(32, 1e-6), nn.RMSNorm(16, 1e-6)


def with_heads_that_do_not_divide(attention: Any) -> None:
    attention.__class__, attention.head_dim = OddAttention, 7


def with_no_whole_number_of_dimensions(attention: Any) -> None:
    attention.__class__, attention.head_dim = OddAttention, 8.0


def with_a_tensor_for_its_function(attention: Any) -> None:
    attention.__class__ = SinkingAttention


def without_a_function(attention: Any) -> None:
    attention.__class__ = SilentAttention


def with_a_layer_of_another_class(attention: Any) -> None:
    attention.k_proj = Quantised(32, 16, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        with_a_parameter,
        with_another_child,
        with_a_norm_of_queries_alone,
        with_head_norms_of_another_kind,
        with_head_norms_of_two_epsilons,
        with_a_head_norm_for_all_heads,
        with_heads_that_do_not_divide,
        with_no_whole_number_of_dimensions,
        with_a_tensor_for_its_function,
        without_a_function,
        with_a_layer_of_another_class,
    ],
)
def test_attention_of_another_kind_is_kept(change: Callable[[Any], None]):
    model = make("llama")
    kept = model.model.layers[1].self_attn
    change(kept)
    expected = logits(model)
    assert len(list(fuse_attention(model))) == count(model, FusedAttention) == LAYERS - 1
    assert model.model.layers[1].self_attn is kept
    assert type(kept.q_proj) is nn.Linear
    assert difference(logits(model), expected) < 1e-5


def test_attention_with_norms_for_every_head_fits():
    model = make("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = nn.RMSNorm(8, 1e-6), nn.RMSNorm(8, 1e-6)
    assert len(list(fuse_attention(model))) == count(model, HeadNorm) == LAYERS


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
    list(fuse_mlps(model))
    assert count(model, GatedMLP) == LAYERS - 1
    assert model.model.layers[1].mlp.gate_proj is kept


def test_an_mlp_with_another_child_is_kept():
    model = make("llama")
    kept = model.model.layers[1].mlp
    kept.norm = nn.Identity()
    assert len(list(fuse_mlps(model))) == count(model, GatedMLP) == LAYERS - 1
    assert model.model.layers[1].mlp is kept


@pytest.mark.parametrize("change", [of_another_class, of_another_dtype, hooked, with_a_forward_of_its_own])
def test_layers_that_are_not_plain_are_not_packed(change: Callable[[Any], None]):
    model = make("llama")
    change(model.model.layers[1].mlp)
    kept = model.model.layers[1].mlp.gate_proj
    list(fuse_weights(model))
    assert count(model, PackedLinear) == 7 * LAYERS
    assert model.model.layers[1].mlp.gate_proj is kept


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_without_the_operations_for_it_nothing_is_packed(missing: str, monkeypatch: pytest.MonkeyPatch):
    there = {name: getattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")}
    del there[missing]
    monkeypatch.setattr(fuse_module.torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace(**there)))
    assert list(fuse_weights(make("llama"))) == []


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
    list(fuse_norms(model))
    assert count(model, kind) == 1
    assert count(model, RMSNorm) == 2 * LAYERS


def test_norms_are_fused_once():
    model = make("qwen3")
    expected = logits(model)
    list(fuse_norms(model))
    fused = {id(module) for module in model.modules() if type(module) is RMSNorm}
    list(fuse_norms(model))
    assert {id(module) for module in model.modules() if type(module) is RMSNorm} == fused
    assert difference(logits(model), expected) < 1e-5


WIDTH = 64
# From where epsilon is nearly all there is under the root to where it is nothing; 16-bit numbers go to 6e4 at least.
SCALES = [1e-5, 1e-3, 1.0, 1e4]
NORM_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden = hidden.double()
    return hidden * (hidden.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", NORM_TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("tokens", [1, SMALL // WIDTH, SMALL // WIDTH + 1, 300])
def test_a_norm_of_few_or_many_tokens_is_that_by_its_formula(tokens: int, eps: float, scale: float, dtype: torch.dtype):
    torch.manual_seed(5)
    weight = (1 + torch.randn(WIDTH) / 4).to(dtype)
    norm = RMSNorm(weight, eps)
    # Their mean is far from 0.
    hidden = ((torch.randn(1, tokens, WIDTH) + 1) * scale).to(dtype)
    found = norm(hidden)
    assert (found.shape, found.dtype) == (hidden.shape, dtype)
    assert difference(found.double(), reference(hidden, weight, eps)) < NORM_TOLERANCE[dtype]
    turned = hidden.transpose(0, 1).expand(-1, 2, -1).transpose(0, 1)
    assert torch.equal(norm(turned)[1:], norm(turned)[:1])
    assert difference(norm(turned).double(), reference(turned, weight, eps)) < NORM_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", NORM_TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_norm_of_heads_is_that_by_its_formula(tokens: int, scale: float, dtype: torch.dtype):
    torch.manual_seed(5)
    weight = (1 + torch.randn(6, 8) / 4).to(dtype)
    # As in a model, with other numbers between those of two tokens.
    heads = ((torch.randn(2, tokens, 8, 8) + 1) * scale).to(dtype)[..., :6, :]
    found = HeadNorm(weight, 1e-6)(heads)
    assert (found.shape, found.dtype) == (heads.shape, dtype)
    assert difference(found.double(), reference(heads, weight, 1e-6)) < NORM_TOLERANCE[dtype]
