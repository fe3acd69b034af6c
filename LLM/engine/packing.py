"""Whether this machine's CPU has an order of its own for the weights of a linear layer. Knows no modules."""

import torch


def packs(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has an order of its own for weights of this type, and kernels that read it."""
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return False
    # Not every CPU has the instructions for 16-bit types.
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return dtype == torch.float32
