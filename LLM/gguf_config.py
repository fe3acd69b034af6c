"""What a GGUF file says of its model, as the config.json of a Hugging Face folder would say it. Loads nothing.

transformers reads the same, but drops in silence what stretches the positions, and knows one end token of several.
"""

from collections.abc import Mapping
from math import isclose, pi
from struct import error as StructError
from struct import unpack
from typing import Any

from LLM.errors import Refused
from LLM.gguf_file import FREQUENCIES, GgufFile
from LLM.loading.steady_file import SteadyFile, shown

# The architectures whose tensors and facts are known here, by llama.cpp's name, and what transformers calls them.
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
STRETCHED = "its GGUF file stretches the model's positions; put the model's own config.json beside it"
KEYS = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
TABLE, OUTPUT = "token_embd.weight", "output.weight"
# What transformers calls the model's parts and those of its layers.
PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma's layers have a norm behind each half too.
GEMMA_PARTS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# How Llama 3.1 to 3.3 were stretched to longer texts: all alike, but for how far.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# The tokens that end an answer: those that the metadata names, and like llama.cpp those of a well-known text.
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = {"<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>"}
CONTROL = 3  # the type of a token that no text becomes


def names_of(file: GgufFile) -> dict[str, str]:
    """Give transformers' names of the weights by those in the file.

    Raises:
        Refused: `load_failed` for another kind of model, with the next step.
    """
    if file.architecture not in FAMILIES:
        known, other = ", ".join(FAMILIES), shown(file.architecture)
        raise _refused(
            f'its GGUF file is of the architecture "{other}", and of GGUF only {known} can be read; take the model\'s '
            "safetensors folder"
        )
    layer_parts = LAYER_PARTS | (GEMMA_PARTS if file.architecture == "gemma3" else {})
    return {tensor.name: _name(tensor.name, layer_parts) for tensor in file.weights}


def _name(name: str, layer_parts: Mapping[str, str]) -> str:
    stem, _, ending = name.rpartition(".")
    if stem in PARTS:
        return f"{PARTS[stem]}.{ending}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if not block.isdecimal() or part not in layer_parts:
        raise _refused("its GGUF file holds a tensor that is not known here; take the model's safetensors folder")
    return f"model.layers.{block}.{layer_parts[part]}.{ending}"


def config_of(file: GgufFile) -> dict[str, Any]:
    """Give the configuration of the model in a file.

    Raises:
        Refused: `load_failed`, if the file of this known kind does not say enough, or says what would be lost.
    """
    if file.fact("rope.scaling.type", "none") != "none":
        raise _refused(STRETCHED)
    try:
        return _config(file)
    except (KeyError, TypeError, ZeroDivisionError, StructError) as error:
        raise _refused("its GGUF file does not tell the model's sizes; put the model's own config.json beside it") from error


def _config(file: GgufFile) -> dict[str, Any]:
    config = {key: file.metadata[f"{file.architecture}.{name}"] for key, name in KEYS.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = file.fact("attention.head_count_kv", heads)
    if not all(isinstance(number, int | float) for number in config.values()):
        raise TypeError("a size is no number, or another one in each layer")
    head_size = file.fact("attention.key_length", config["hidden_size"] // heads)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    token = "tokenizer.ggml."
    return {
        **config,
        "model_type": FAMILIES[file.architecture],
        "head_dim": head_size,
        "vocab_size": tensors[TABLE].shape[0],
        "tie_word_embeddings": OUTPUT not in tensors,
        "dtype": dtype_of(file),
        "bos_token_id": file.metadata.get(token + "bos_token_id"),
        "eos_token_id": end_token_ids(file) or None,
        "pad_token_id": file.metadata.get(token + "padding_token_id"),
        **_attention(file, head_size, "blk.0.attn_q.bias" in tensors),
    }


def _attention(file: GgufFile, head_size: int, bias: bool) -> dict[str, Any]:
    rope = _rope(file, file.fact("rope.freq_base", 10000.0), head_size)
    if file.architecture != "gemma3":
        return {"rope_parameters": rope, "attention_bias": bias}
    near = {"rope_type": "default", "rope_theta": file.fact("rope.freq_base_swa", 10000.0)}
    return {
        "rope_parameters": {"full_attention": rope, "sliding_attention": near},
        "sliding_window": file.metadata["gemma3.attention.sliding_window"],
        "query_pre_attn_scalar": head_size,
    }


def _rope(file: GgufFile, theta: float, head_size: int) -> dict[str, Any]:
    """Say how positions turn; a file has no more of Llama 3's way than what it comes to for each pair of numbers."""
    stretch = next((tensor for tensor in file.tensors if tensor.name == FREQUENCIES), None)
    if stretch is None:
        return {"rope_type": "default", "rope_theta": theta}
    with SteadyFile(file.path, file.version) as opened:
        stored = unpack(f"<{head_size // 2}f", opened.read(head_size // 2 * 4, stretch.offset))
    factor = max(stored)
    expected = [_llama3_stretch(2 * pi * theta ** (2 * i / head_size), factor) for i in range(head_size // 2)]
    if not all(isclose(a, b, rel_tol=1e-3) for a, b in zip(stored, expected, strict=True)):
        raise _refused(STRETCHED)
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}


def _llama3_stretch(wavelength: float, factor: float) -> float:
    """Give how much longer Llama 3 makes a wavelength: long ones by the whole factor, short ones not."""
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] / wavelength
    smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
    return 1 / ((1 - smooth) / factor + smooth)


def dtype_of(file: GgufFile) -> str:
    """Give the precision that fits a file; what is packed smaller mostly came from bfloat16."""
    packings = {tensor.packing for tensor in file.tensors if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(packings), "bfloat16")


def end_token_ids(file: GgufFile) -> list[int]:
    """Give the tokens that end an answer."""
    stated = (file.metadata.get(f"tokenizer.ggml.{name}") for name in END_IDS)
    named = {i for i in stated if i is not None}
    texts = file.metadata.get("tokenizer.ggml.tokens", [])
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    known = {i for i, (text, kind) in enumerate(zip(texts, types, strict=False)) if kind == CONTROL and text in END_TEXTS}
    return sorted(named | known)


def _refused(why: str) -> Refused:
    return Refused("load_failed", f"the model's folder cannot be loaded: {why}")
