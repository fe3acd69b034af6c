"""Writes a Llama-like model folder as a GGUF file for llama.cpp, at full precision. Knows no quantisation.

llama.cpp rotates pairs of neighbours where transformers rotates halves, so the rows of the query and key projections change
places (https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py, `LlamaModel.permute`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from bench.sides.process import CACHE

TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
FILE_TYPES = {"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def cached(folder: Path, dtype: str) -> Path:
    """Give the GGUF file of a model folder, written if it is not there or older than the weights."""
    path = CACHE / f"{folder.name}-{dtype}.gguf"
    weights = max(file.stat().st_mtime for file in folder.glob("*.safetensors"))
    if not path.exists() or path.stat().st_mtime < weights:
        CACHE.mkdir(exist_ok=True)
        write(folder, path.with_suffix(".partial"), dtype)
        path.with_suffix(".partial").rename(path)
    return path


def write(folder: Path, path: Path, dtype: str) -> None:
    """Write the model in `folder`, of the Llama architecture, to `path` with matrices of `dtype` and vectors in float32.

    Raises:
        ValueError: the model is of another architecture.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"] or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{folder.name} is no plain Llama model")
    writer = gguf.GGUFWriter(path, "llama")
    _write_config(writer, config)
    writer.add_file_type(FILE_TYPES[dtype])
    _write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in _tensors(folder):
        kind = name.split(".")[-2]
        values = permuted(tensor, heads[kind]) if kind in heads else tensor
        target = TYPES[dtype] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Bring the rows of a query or key projection, [heads x dimension, in], into llama.cpp's order."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - an open safetensors file is no mapping
                yield _renamed(name), tensors.get_tensor(name).to(torch.float32).numpy()


def _renamed(name: str) -> str:
    """Translate a tensor's name: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Write a byte-level BPE tokenizer; its pre-tokenizer is taken to be the default model's."""
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[ids[token] in special] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
