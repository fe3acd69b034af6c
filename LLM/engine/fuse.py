"""Fewer and faster operations per layer of a transformers model, by swapping modules that have the structure for it.

Every fusion is checked by the logits of a short forward pass and undone where they differ, so a model that only looks like
the known ones keeps its own operations. Knows neither families nor names of models, and nothing of caches; the modules it
puts in are in `fused_modules.py`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from LLM.engine.fused_modules import ATTENTION_FUNCTIONS, FusedAttention, GatedMLP, HeadNorm, PackedLinear, RMSNorm
from LLM.engine.packing import packs
from LLM.engine.rounding import FLOAT32, relative_error, tolerance

log = logging.getLogger(__name__)

# A fusion swaps one module after the other, and gives what undoes each; nothing if nothing in the model fits it.
Undo = Callable[[], None]
Fusion = Callable[[nn.Module], Iterator[Undo]]

# What the attention and the gated MLP of most families consist of.
QKV, ATTENTION, HEAD_NORMS = ("q_proj", "k_proj", "v_proj"), {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
GATE_UP, MLP = ("gate_proj", "up_proj"), {"gate_proj", "up_proj", "down_proj", "act_fn"}
RECORDER = "wsserver_recorder"
PROBE = 8  # tokens of the forward pass that every fusion is checked by
MODULE_TOLERANCE = 1e-2  # of one norm, or one attention's heads, in a 16-bit type


@torch.no_grad()
def fuse(model: Any) -> tuple[str, ...]:
    """Fuse in place what can be fused, and give the names of what was.

    Takes a model where it is to stay, with its own attention. It then computes what it did, for inference alone. One layer's
    weights exist twice meanwhile; on a CPU tied embeddings do so from then on, because the output layer gets its own order.
    """
    expected = _logits(model)
    fusions = ON_CPU if model.device.type == "cpu" else ON_GPU
    return tuple(name for name, fusion in fusions.items() if _holds(name, fusion, model, expected))


def fuse_norms(model: nn.Module) -> Iterator[Undo]:
    """Compute every RMS norm in as few operations as the device has for it."""
    return _swapped(model, _rms_norm)


def fuse_attention(model: Any) -> Iterator[Undo]:
    """Compute query, key and value together, and turn queries and keys by their positions together."""
    if model.config._attn_implementation not in ATTENTION_FUNCTIONS:
        return iter(())  # the function is the family's own
    calls = _calls(model)
    return _swapped(model, lambda module: _attention(module, calls[module]) if module in calls else None)


def fuse_mlps(model: nn.Module) -> Iterator[Undo]:
    """Compute both projections of the hidden states together in every gated MLP."""
    return _swapped(model, _mlp)


def fuse_weights(model: nn.Module) -> Iterator[Undo]:
    """Lay out the weights of linear layers in the order in which the CPU's fastest kernels read them."""
    return (_pack(parent, name) for parent, name in places(model) if _can_be_packed(getattr(parent, name)))


ON_GPU: dict[str, Fusion] = {"norms": fuse_norms, "attention": fuse_attention, "MLPs": fuse_mlps}
ON_CPU: dict[str, Fusion] = {**ON_GPU, "weights": fuse_weights}


def _holds(name: str, fusion: Fusion, model: Any, expected: Tensor) -> bool:
    """Apply a fusion; true if the model is still itself, else it is undone. What undoes it is gone after that."""
    undo: list[Undo] = []
    try:
        undo.extend(fusion(model))
        if not undo:
            return False
        error = relative_error(_logits(model), expected)
    except Exception:  # in another's code
        log.warning("the model does not run with fused %s", name, exc_info=True)
        error = torch.inf
    if error <= tolerance(model):
        return True
    log.warning("fused %s change the model's logits by %.1e, so they are undone", name, error)
    for step in reversed(undo):
        step()
    return False


def _logits(model: Any) -> Tensor:
    config = model.config.get_text_config()
    ids = [(7919 * i + 11) % config.vocab_size for i in range(PROBE)]
    # At the end of what the model knows, where those attend differently that do so far from the start.
    last = getattr(config, "max_position_embeddings", PROBE)
    positions = torch.arange(last - PROBE, last, dtype=torch.long, device=model.device)[None]
    logits: Tensor = model(
        input_ids=torch.tensor([ids], dtype=torch.long, device=model.device), position_ids=positions, use_cache=False
    ).logits
    return logits.float()


@dataclass(slots=True)
class Call:
    """What an attention was called with, and what it called its attention function with."""

    heads: tuple[Tensor, ...]  # queries, keys and values, [batch, heads, tokens, dimension]
    given: dict[str, Any]
    arguments: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


def _calls(model: Any) -> dict[nn.Module, Call]:
    """Let the model run on a few tokens, and give the calls of its attention."""

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        call = vars(module)[RECORDER]
        call.arguments, call.named = arguments, named
        call.given = {name: what for name, what in call.given.items() if name not in named}

    own = model.config._attn_implementation
    model.set_attn_implementation(RECORDER)
    hooks = []
    try:
        _logits(model)  # now it is known which modules call an attention function
        attentions = [module for module in model.modules() if RECORDER in vars(module)]
        hooks = [module.register_forward_hook(note, with_kwargs=True) for module in attentions]
        _logits(model)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(own)
    return {module: vars(module).pop(RECORDER) for module in attentions}


def _recorder(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
    # Kept in the module: models may be loaded side by side.
    vars(module)[RECORDER] = Call((query, key, value), given)
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(RECORDER, _recorder)


def _swapped(model: nn.Module, fused: Callable[[nn.Module], nn.Module | None]) -> Iterator[Undo]:
    """Swap each module for what `fused` makes of it, if anything."""
    for parent, name in places(model):
        own = getattr(parent, name)
        if is_bare(own) and (module := fused(own)) and module is not own:
            yield _swap(parent, name, module)


def places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Give every module of a model as its parent and its name there."""
    # Without the modules themselves: whoever goes through the list would keep their weights alive to its end.
    return [(parent, name) for parent in model.modules() for name, _ in parent.named_children()]


def _swap(parent: nn.Module, name: str, module: nn.Module) -> Undo:
    old = getattr(parent, name)
    setattr(parent, name, module)
    return partial(setattr, parent, name, old)


def is_bare(module: nn.Module) -> bool:
    """Whether a module does what its class does, and nothing besides."""
    # Hooks, and a forward of the object's own, would be passed over.
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer whose weight is a matrix of numbers, and nothing besides."""
    # Quantised layers are subclasses.
    return type(module) is nn.Linear and is_bare(module)


@torch.no_grad()
def _attention(own: nn.Module, call: Call) -> FusedAttention | None:
    """Give what computes what the attention `own` does; None if it is of another kind."""
    size, children, linears = getattr(own, "head_dim", None), dict(own.named_children()), _alike(own, QKV)
    if not linears or children.keys() not in (ATTENTION, ATTENTION | HEAD_NORMS) or list(own.parameters(recurse=False)):
        return None
    if not isinstance(size, int) or any(linear.out_features % size for linear in linears):
        return None
    queries, keys, _ = [linear.out_features // size for linear in linears]
    norm = None
    if children.keys() > ATTENTION and not (norm := _head_norm(children["q_norm"], children["k_norm"], size, queries, keys)):
        return None
    if any(isinstance(what, Tensor) for what in call.given.values()):
        return None
    # What attention functions ask of the module that calls them: the layer's number, the scaling and the like.
    facts = {name: fact for name, fact in vars(own).items() if not name.startswith("_")}
    fused = FusedAttention(facts, _merge(linears), (queries, keys), norm, children["o_proj"], call.given)
    # What one does otherwise may hardly show in the logits of a few tokens.
    try:
        heads = fused.heads(*call.arguments, **call.named)
        errors = [relative_error(ours, theirs) for ours, theirs in zip(heads, call.heads, strict=True)]
    except (RuntimeError, TypeError):
        return None
    return fused if max(errors) <= module_tolerance(heads[0].dtype) else None


def _head_norm(of_queries: nn.Module, of_keys: nn.Module, size: int, queries: int, keys: int) -> HeadNorm | None:
    """Give one norm for so many heads of queries and of keys, each of `size`; None if theirs are of another kind."""
    first, second = _rms_norm(of_queries), _rms_norm(of_keys)
    if not first or not second or first.eps != second.eps or not first.size == second.size == (size,):
        return None
    return HeadNorm(torch.cat([first.weight.expand(queries, -1), second.weight.expand(keys, -1)]), first.eps)


def _mlp(own: nn.Module) -> GatedMLP | None:
    """Give what may compute what the gated MLP `own` does; None if it is of another kind."""
    children, linears = dict(own.named_children()), _alike(own, GATE_UP)
    if not linears or children.keys() != MLP:
        return None
    return GatedMLP(_merge(linears), children["act_fn"], children["down_proj"])


def _alike(parent: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """Give the children of these names if they are linear layers that can be one layer, else none."""
    linears = [child for name in names if is_plain(child := getattr(parent, name, None))]
    kinds = {(m.in_features, m.bias is None, m.weight.dtype, m.weight.device) for m in linears}
    return linears if len(linears) == len(names) and len(kinds) == 1 else []


def _merge(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Make one layer of linear layers of one input; their weights become views of its weight."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
    sizes = [linear.out_features for linear in linears]
    for linear, part in zip(linears, torch.split_with_sizes(weight, sizes), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return _linear(weight, bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _rms_norm(norm: nn.Module) -> RMSNorm | None:
    """Give the norm that does what `norm` does; None if there is none."""
    if isinstance(norm, RMSNorm):
        return norm
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not type(norm).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    # So small that epsilon matters too.
    probe = torch.linspace(-2e-3, 3e-3, 2 * weight.numel(), dtype=torch.float32, device=weight.device)
    probe = probe.view(2, -1).to(weight.dtype)
    expected = norm(probe)
    for scale in (weight, 1 + weight):
        fused = RMSNorm(scale, eps)
        if relative_error(fused(probe), expected) <= module_tolerance(weight.dtype):
            return fused
    return None


def module_tolerance(dtype: torch.dtype) -> float:
    """Give the largest relative error of one module that may be rounding."""
    return FLOAT32 if dtype == torch.float32 else MODULE_TOLERANCE


def _can_be_packed(module: object) -> bool:
    return is_plain(module) and packs(module.weight.dtype)


def _pack(parent: nn.Module, name: str) -> Undo:
    linear = getattr(parent, name)
    packed = PackedLinear(linear.weight, linear.bias)
    setattr(parent, name, packed)
    # Made from the packed weight, which holds the same numbers: to keep the old one would take as much memory again.
    return lambda: setattr(parent, name, _linear(packed.weight.to_dense(), packed.bias))
