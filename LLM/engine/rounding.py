"""How far two computations of the same logits may be apart: what is further apart is no rounding but another model."""

from typing import Any

import torch
from torch import Tensor

# Relative errors. Another order of additions gives 1e-5 in float32; a 16-bit type rounds after every operation, and what is
# rounded elsewhere moves the logits of thirty layers by 3e-2, about as far as they are from float32's. Layers of 4 bits
# compute in 16. Those of 8 bits round their inputs too, to 1 part in 127 of the row's largest, and put aside what is larger
# than a bound in any row beside it: SmolLM2's logits move by 1.2e-1 when a text is cut in three.
FLOAT32, ROUGH, EIGHT_BITS = 1e-4, 5e-2, 3e-1


def tolerance(model: Any) -> float:
    """Give the largest relative error of a model's logits that may be rounding."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    if torch.int8 in kinds:
        return EIGHT_BITS
    return FLOAT32 if model.dtype == torch.float32 and torch.uint8 not in kinds else ROUGH


@torch.no_grad()
def relative_error(found: Tensor, expected: Tensor) -> float:
    """Give how far `found` is from `expected`, of the same shape, in parts of that one's length."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
