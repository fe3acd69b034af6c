"""Layers whose decode steps run by the kernels of `decode_kernels.py`, in the place of those that consist of known parts.

Two norms, an attention and a gated MLP as `fuse.py` makes them, each with what came before added to what it gives. Knows
neither families nor names of models. Only to be imported where triton is.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from LLM.engine.decode_kernels import add_linear, gated_linear, normed_linear, rotate
from LLM.engine.fuse import is_bare, is_plain, module_tolerance, places
from LLM.engine.fused_modules import FusedAttention, GatedMLP, RMSNorm
from LLM.engine.graph_decode import DecodeStep
from LLM.engine.rounding import relative_error

log = logging.getLogger(__name__)

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class DecodeLayer(nn.Module):
    """A layer that runs decode steps by few kernels, and everything else as `own` does."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        # What models ask of their layers: of which type its attention is, and the like.
        vars(self).update({name: fact for name, fact in vars(own).items() if not name.startswith("_")})
        self.own = own

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """Give [batch, tokens, hidden] for the same."""
        step = named.get("step")
        if not isinstance(step, DecodeStep):
            return self.own(hidden_states, *arguments, **named)
        cos, sin = named["position_embeddings"]
        return self._decode(hidden_states[0], cos[0], sin[0], step)[None]

    def _decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, step: DecodeStep) -> Tensor:
        """Give [rows, hidden] for the same, which are overwritten: nobody looks at a layer's input after it."""
        own: Any = self.own
        attention, mlp = own.self_attn, own.mlp
        heads = normed_linear(hidden, own.input_layernorm, attention.qkv_proj.weight)
        heads = heads.view(*heads.shape[:2], -1, attention.head_dim)
        _, kv = attention.counts
        scaling, window, softcap = (attention.given.get(name) for name in ("scaling", "sliding_window", "softcap"))
        like = hidden.new_empty(0, kv, attention.head_dim)
        keys, values = step.cache.layer(attention.layer_idx, like, like, window)
        query = rotate(heads, attention.counts, cos, sin, attention.head_norm, step.slots, keys, values)
        mixed = step.attend(query.transpose(0, 1), keys, values, scaling, window, softcap)
        hidden = add_linear(hidden, mixed.flatten(1), attention.o_proj.weight)
        gated = gated_linear(hidden, own.post_attention_layernorm, mlp.gate_up_proj.weight)
        return add_linear(hidden, gated, mlp.down_proj.weight)


@torch.inference_mode()
def fuse_layers(model: nn.Module, run: Callable[[], object]) -> int:
    """Put DecodeLayers in the place of a fused model's layers that fit, and give how many; `run` runs the model once."""
    fitting = [(parent, name) for parent, name in places(model) if _fits(getattr(parent, name))]
    calls: dict[nn.Module, tuple[dict[str, Any], Any]] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls[module] = ({"hidden_states": arguments[0], **named} if arguments else named), output

    hooks = [getattr(parent, name).register_forward_hook(note, with_kwargs=True) for parent, name in fitting]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    swapped = 0
    for parent, name in fitting:
        own = getattr(parent, name)
        if own in calls and _adds_up(own, *calls[own]):
            setattr(parent, name, DecodeLayer(own))
            swapped += 1
    log.info("%d layers have decode kernels", swapped)
    return swapped


def _fits(layer: nn.Module) -> bool:
    """Whether it has the parts, and they have no peculiarities that the kernels do not know."""
    parts: dict[str, Any] = dict(layer.named_children())
    if parts.keys() != PARTS or list(layer.parameters(recurse=False)) or not is_bare(layer):
        return False
    attention, mlp = parts["self_attn"], parts["mlp"]
    if not isinstance(attention, FusedAttention) or not isinstance(mlp, GatedMLP) or not _is_silu(mlp.act_fn):
        return False
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    return all(is_plain(m) and m.bias is None for m in linears) and all(isinstance(norm, RMSNorm) for norm in norms)


def _is_silu(function: nn.Module) -> bool:
    probe = torch.linspace(-9, 9, 64, dtype=torch.float32)
    return torch.allclose(function(probe), silu(probe))


def _adds_up(own: Any, named: dict[str, Any], output: Any) -> bool:
    """Whether a layer gives what its parts give, each added to what came before it."""
    named = dict(named)
    hidden = named.pop("hidden_states")
    attended, _ = own.self_attn(own.input_layernorm(hidden), **named)
    summed = hidden + attended
    summed = summed + own.mlp(own.post_attention_layernorm(summed))
    return isinstance(output, Tensor) and relative_error(output, summed) <= module_tolerance(output.dtype)
