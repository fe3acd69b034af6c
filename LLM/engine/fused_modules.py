"""The modules that `fuse.py` puts into a model: what a transformers model computes, in fewer or faster operations.

On a CPU one token's way through a layer is a row of operations so small that their number counts, not their size: between
two of them the weights push everything else out of the caches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm
from transformers import AttentionInterface

ATTENTION_FUNCTIONS = AttentionInterface()
# Up to so many numbers a norm's time is that of its operations.
SMALL = 8192
# What torch's own compiler calls for such products: unlike torch's other ways to FBGEMM it can stand in a graph, where a
# call through Python takes as long as a small product.
FBGEMM = torch.ops._quantized


class RMSNorm(nn.Module):
    """A norm by the root of the mean square: on a CPU a few tokens' in fewer operations than torch's own."""

    weight: Tensor
    twice: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.size = (weight.numel(),)
        self.register_buffer("twice", torch.cat((weight, weight)).detach())
        self.register_buffer("weight", self.twice[: weight.numel()])

    def forward(self, hidden: Tensor) -> Tensor:
        """Give [..., size] for the same."""
        if hidden.numel() > SMALL or not hidden.is_cpu:
            return rms_norm(hidden, self.size, self.weight, self.eps)
        # The mean of numbers and their opposites is 0, and their variance is the mean square.
        both = layer_norm(torch.cat((hidden, -hidden), -1), self.twice.shape, self.twice, None, self.eps)
        return both[..., : self.size[0]]


class HeadNorm(nn.Module):
    """An RMS norm of each head, with a weight for each of them."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight.detach())

    def forward(self, heads: Tensor) -> Tensor:
        """Give [..., heads, dimension] for the same."""
        return rms_norm(heads, heads.shape[-1:], None, self.eps) * self.weight


class FusedAttention(nn.Module):
    """Attention with rotary positions that projects the hidden states once.

    Calls the attention function that the model's configuration names, and hands on `given`, as the attention does whose
    place it takes. `facts` are that one's attributes, and `counts` says how many heads there are of queries and of keys.
    """

    head_dim: int
    layer_idx: int
    config: Any

    def __init__(
        self,
        facts: Mapping[str, Any],
        qkv_proj: nn.Module,
        counts: tuple[int, int],
        head_norm: HeadNorm | None,
        o_proj: nn.Module,
        given: Mapping[str, Any],
    ) -> None:
        super().__init__()
        vars(self).update(facts)
        self.qkv_proj = qkv_proj
        self.head_norm = head_norm
        self.o_proj = o_proj
        self.counts = counts
        self.given = given

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Give [batch, tokens, hidden] for the same, and no attention weights."""
        query, key, value = self.heads(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(self, query, key, value, attention_mask, **{**self.given, **others})
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None

    def heads(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *rest: Any, **others: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give the queries, keys and values of what `forward` is called with, [batch, heads, tokens, dimension]."""
        queries, keys = self.counts
        heads = self.qkv_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim)
        turned, value = heads.split_with_sizes((queries + keys, keys), -2)
        if self.head_norm is not None:
            turned = self.head_norm(turned)
        cos, sin = position_embeddings
        low, high = turned.chunk(2, -1)
        turned = turned * cos.unsqueeze(-2) + torch.cat((-high, low), -1) * sin.unsqueeze(-2)
        query, key = turned.transpose(1, 2).split_with_sizes(self.counts, 1)
        return query, key, value.transpose(1, 2)


class GatedMLP(nn.Module):
    """An MLP with a gate that projects the hidden states once."""

    def __init__(self, gate_up_proj: nn.Module, act_fn: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.act_fn = act_fn
        self.down_proj = down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Give [..., hidden] for the same."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)
        output: Tensor = self.down_proj(self.act_fn(gate) * up)
        return output


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in an order of oneDNN's own, which no other operation can read."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
        self.bias = bias
        # The weight as FBGEMM has it, and what it adds.
        self._one_row: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Give [..., out] for `hidden` [..., in]."""
        if self._one_row and hidden.numel() == hidden.shape[-1]:
            product: Tensor = FBGEMM.wrapped_fbgemm_linear_fp16_weight(hidden.float(), *self._one_row, self.weight.shape[0])
            return product.to(hidden.dtype)
        if torch.compiler.is_compiling():
            output: Tensor = torch.ops.wsserver.packed_linear(hidden, self.weight, self.bias)
            return output
        return _packed_linear(hidden, self.weight, self.bias)

    def pack_for_one_row(self) -> int:
        """Keep a bfloat16 weight for FBGEMM too, as float16, and give the bytes that takes; 0 if that cannot be.

        A product with one row is reading the weight, and FBGEMM does it in two thirds of oneDNN's time; with more rows than
        a few, oneDNN is faster. FBGEMM computes in float32, and float16 holds all of a bfloat16's digits.
        """
        if self.weight.dtype != torch.bfloat16 or not has_fbgemm():
            return 0
        weight = self.weight.to_dense()
        # Less than its smallest number is 0 to float16, which is nothing beside the others; more than its largest is not.
        if not weight.half().isfinite().all():
            return 0
        bias = torch.zeros(weight.shape[0], dtype=torch.float32) if self.bias is None else self.bias.float()
        self._one_row = FBGEMM.wrapped_fbgemm_pack_gemm_matrix_fp16(weight.float()), bias
        return weight.nbytes

    def forget_one_row(self) -> None:
        """Keep the weight for oneDNN alone again."""
        self._one_row = None


def has_fbgemm() -> bool:
    """Say whether this torch can multiply by FBGEMM."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(FBGEMM, "wrapped_fbgemm_linear_fp16_weight")


def _packed_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(hidden, weight, bias, "none", [], "")
    return output


def _like_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


# The compiler takes packed weights for nothing but constants, so the layer is an operation of its own in a compiled graph.
_LIBRARY: Any = torch.library.Library("wsserver", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("packed_linear(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("packed_linear", _packed_linear, "MkldnnCPU")
_LIBRARY.impl("packed_linear", _like_linear, "Meta")
