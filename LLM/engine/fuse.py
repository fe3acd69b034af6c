"""Fewer and faster operations per layer of a transformers model, by swapping modules that have the structure for it.

Every fusion is checked by the logits of a short forward pass and undone where they differ, so a model that only looks like
the known ones keeps its own operations. Knows neither families nor names of models, and nothing of caches.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# A fusion gives the steps that undo it, to be taken from the last to the first; none if nothing in the model fits it.
Undo = Callable[[], None]
Fusion = Callable[[nn.Module], list[Undo]]

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PROBE = 8  # tokens of the forward pass that every fusion is checked by
# Relative errors of logits. Another order of additions gives 1e-5 in float32; a 16-bit type rounds after every operation,
# and what is rounded elsewhere moves the logits of thirty layers by 3e-2, about as far as they are from float32's.
TOLERANCE = {torch.float32: 1e-4}
ROUGH_TOLERANCE = 5e-2
NORM_TOLERANCE = 1e-2  # of one norm, in a 16-bit type


@torch.no_grad()
def fuse(model: Any) -> tuple[str, ...]:
    """Fuse in place what can be fused, and give the names of what was.

    Takes a model where it is to stay, with its own attention. It then computes what it did, for inference alone. One layer's
    weights exist twice meanwhile; on a CPU tied embeddings do so from then on, because the output layer gets its own order.
    """
    expected = _logits(model)
    fusions = ON_CPU if model.device.type == "cpu" else ON_GPU
    return tuple(name for name, fusion in fusions.items() if _holds(name, fusion, model, expected))


def fuse_norms(model: nn.Module) -> list[Undo]:
    """Replace every RMS norm by torch's own, which is one operation on a GPU."""
    undo: list[Undo] = []
    for parent, name in _places(model):
        norm = getattr(parent, name)
        if type(norm).__name__.endswith("RMSNorm") and (fused := _rms_norm(norm)):
            undo.append(_swap(parent, name, fused))
    return undo


def fuse_projections(model: nn.Module) -> list[Undo]:
    """Compute the projections of one input together: query, key and value; gate and up."""
    undo: list[Undo] = []
    for parent in list(model.modules()):
        for names in SIBLINGS:
            if linears := _alike(parent, names):
                merged = Merged(linears)
                undo += [_swap(parent, name, Part(merged, index)) for index, name in enumerate(names)]
    return undo


def fuse_weights(model: nn.Module) -> list[Undo]:
    """Lay out the weights of linear layers in the order in which the CPU's fastest kernels read them."""
    return [_pack(parent, name) for parent, name in _places(model) if _can_be_packed(getattr(parent, name))]


# Torch's norm costs a CPU as much as the models' own.
ON_CPU: dict[str, Fusion] = {"projections": fuse_projections, "weights": fuse_weights}
ON_GPU: dict[str, Fusion] = {"norms": fuse_norms, "projections": fuse_projections}


NOTHING: tuple[None, Sequence[Tensor]] = (None, ())


class Merged(nn.Module):
    """Linear layers of one input as one layer; their weights become views of its weight."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._sizes = [linear.out_features for linear in linears]
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
        self.linear = _linear(weight, bias)
        for linear, part in zip(linears, torch.split_with_sizes(weight, self._sizes), strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)
        # In a list, because to set an attribute of a module is slow.
        self._latest: list[tuple[Tensor | None, Sequence[Tensor]]] = [NOTHING]

    def part(self, index: int, hidden: Tensor) -> Tensor:
        """Give what the layer at `index` makes of `hidden` [..., in]: [..., out]."""
        known, parts = self._latest[0]
        # A model calls the layers one after the other with the same tensor. If it does not, that costs time alone.
        if known is not hidden:
            parts = torch.split_with_sizes(self.linear(hidden), self._sizes, -1)
        # The last one lets go: large tensors are not to live until the next step.
        self._latest[0] = (hidden, parts) if index < len(parts) - 1 else NOTHING
        return parts[index]


class Part(nn.Module):
    """One of the layers that were merged, in its old place."""

    def __init__(self, merged: Merged, index: int) -> None:
        super().__init__()
        self.merged = merged
        self._index = index

    def forward(self, hidden: Tensor) -> Tensor:
        """Give the layer's output [..., out] for `hidden` [..., in]."""
        return self.merged.part(self._index, hidden)


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in an order of oneDNN's own, which no other operation can read."""

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()))
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Give [..., out] for `hidden` [..., in]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
        return output


def _holds(name: str, fusion: Fusion, model: Any, expected: Tensor) -> bool:
    """Apply a fusion; true if the model is still itself, else it is undone. What undoes it is gone after that."""
    undo = fusion(model)
    if not undo:
        return False
    try:
        error = float((_logits(model) - expected).norm() / expected.norm())
    except (RuntimeError, AttributeError, TypeError):
        log.warning("the model does not run with fused %s", name, exc_info=True)
        error = torch.inf
    if error <= TOLERANCE.get(model.dtype, ROUGH_TOLERANCE):
        return True
    log.warning("fused %s change the model's logits by %.1e, so they are undone", name, error)
    for step in reversed(undo):
        step()
    return False


def _logits(model: Any) -> Tensor:
    size = model.config.get_text_config().vocab_size
    ids = [(7919 * i + 11) % size for i in range(PROBE)]
    logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits.float()


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    # Without the modules themselves: whoever goes through the list would keep their weights alive to its end.
    return [(parent, name) for parent in model.modules() for name, _ in parent.named_children()]


def _swap(parent: nn.Module, name: str, module: nn.Module) -> Undo:
    old = getattr(parent, name)
    setattr(parent, name, module)
    return partial(setattr, parent, name, old)


def _is_plain(module: object) -> TypeGuard[nn.Linear]:
    # Quantised layers are subclasses. Hooks, and a forward of the object's own, would be passed over.
    if type(module) is not nn.Linear:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _alike(parent: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """Give the children of these names if they are linear layers that can be one layer, else none."""
    linears = [child for name in names if _is_plain(child := getattr(parent, name, None))]
    kinds = {(m.in_features, m.bias is None, m.weight.dtype, m.weight.device) for m in linears}
    return linears if len(linears) == len(names) and len(kinds) == 1 else []


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _rms_norm(norm: nn.Module) -> nn.RMSNorm | None:
    """Give torch's norm that does what `norm` does; None if there is none."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    # So small that epsilon matters too.
    probe = torch.linspace(-2e-3, 3e-3, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    expected = norm(probe).float()
    for scale in (weight, 1 + weight):
        fused = nn.RMSNorm(weight.shape, eps, device="meta")
        fused.weight = nn.Parameter(scale, requires_grad=False)
        error = (fused(probe).float() - expected).norm() / expected.norm()
        if error <= TOLERANCE.get(weight.dtype, NORM_TOLERANCE):
            return fused
    return None


def _can_be_packed(module: object) -> bool:
    ops = torch.ops.mkldnn
    if not (_is_plain(module) and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return False
    # Not every CPU has the instructions for 16-bit types.
    if module.weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if module.weight.dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return module.weight.dtype == torch.float32


def _pack(parent: nn.Module, name: str) -> Undo:
    packed = PackedLinear(getattr(parent, name))
    setattr(parent, name, packed)
    # Made from the packed weight, which holds the same numbers: to keep the old one would take as much memory again.
    return lambda: setattr(parent, name, _linear(packed.weight.to_dense(), packed.bias))
