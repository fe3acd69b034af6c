"""Linear layers whose weights have 8 or 4 bits, by bitsandbytes: less memory for a little of what the model knows.

int8 is LLM.int8() (https://arxiv.org/abs/2208.07339); nf4 and fp4 have a scale for each 64 weights
(https://arxiv.org/abs/2305.14314). The embedding table and the output layer keep the model's precision.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from LLM._base_model_handler import LoadOptions

# It says of every product that its input is cast, tens of thousands of times a second.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# What its kernel for CPUs with bfloat16 takes: so many rows at once, and whole blocks of weights with one scale.
CPU_ROWS, BLOCK = 32, 64


def bitsandbytes_config(options: LoadOptions, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Give what transformers is to quantise by while it loads; layers that a GPU offloads stay as they are."""
    if options.quantization == "none":
        return None
    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=options.offload)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_enable_fp32_cpu_offload=options.offload,
    )


@torch.no_grad()
def settle(model: Any, goes_on: Callable[[], None]) -> None:
    """Make a model's 4-bit layers ready to run, and to be freed with the model; `goes_on` is called before each of them.

    A CPU's bring their weights into the order of its kernel here, which they would else do in the first step.
    """
    for layer in [module for module in model.modules() if type(module).__name__ == "Linear4bit"]:
        goes_on()
        # It was for the time until the weight is quantised. Circles are found by collections alone, and frozen ones never.
        layer.weight.module = None
        if layer.weight.device.type != "cpu":
            continue
        if layer.out_features % CPU_ROWS or layer.in_features % BLOCK:
            layer.support_avx512bf16_for_cpu = False  # its kernel would refuse them in the middle of a step
        else:
            layer(torch.zeros(1, layer.in_features, dtype=model.dtype))
