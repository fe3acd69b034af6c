"""How kernels are launched so that each begins while the one before it ends. Knows no kernel.

Programmatic dependent launch: a kernel's programs start as soon as the one before lets them, prepare what does not depend on
it, and wait for its end before they look at what it wrote. So every kernel that is launched like this has to wait, and lets
the next one start only after that; whatever was written two kernels ago is there at once.
https://docs.nvidia.com/cuda/cuda-programming-guide/04-special-topics/programmatic-dependent-launch.html
"""

from functools import cache
from typing import Any

import torch


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Give what a kernel is launched with: `EARLY`, whether it has to wait, and that Triton is to let it begin early."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
