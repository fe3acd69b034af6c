"""Writes a model folder as the GGUF file that llama.cpp's conversion makes of it: names, order of rows, facts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
Packing = gguf.GGMLQuantizationType


def write_gguf(path: Path, folder: Path, packing: Packing = Packing.F32, pre: str = "smollm", **facts: Any) -> Path:
    """Write the model of a folder of safetensors in float32; `facts` come on top, by their full names without the prefix."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    add_sizes(writer, config)
    add_tokenizer(writer, Tokenizer.from_file(str(folder / "tokenizer.json")), pre)
    if (folder / "chat_template.jinja").exists():
        writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for role in ("bos", "eos"):
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", config[f"{role}_token_id"])
    for name, value in facts.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{writer.arch}.{name}", value)
    if config["rope_parameters"].get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", stretches(folder))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[writer.arch.upper()], config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, ending = name.rpartition(".")
        stored = as_llama_cpp_has_it(config, stem, tensor)
        kind = packing if stored.ndim > 1 else Packing.F32
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", gguf.quantize(stored, kind), raw_dtype=kind)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if writer.arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])


def stretches(folder: Path) -> np.ndarray:
    """By how much transformers turns each pair of numbers slower than a model that was not stretched."""
    config = AutoConfig.from_pretrained(folder)
    slow, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    factors: np.ndarray = (plain / slow).numpy()
    return factors


def as_llama_cpp_has_it(config: dict[str, Any], stem: str, tensor: np.ndarray) -> np.ndarray:
    if config["model_type"] == "gemma3_text" and stem.endswith("norm"):
        return tensor + 1
    if ARCHITECTURES[config["model_type"]] == "llama" and stem.endswith(("q_proj", "k_proj")):
        heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
        # convert_hf_to_gguf.py's LlamaModel.permute
        turned = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2)
        return turned.reshape(tensor.shape)
    return tensor


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    told = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    texts = sorted(vocabulary, key=lambda text: vocabulary[text])
    added = {token["content"]: 3 if token["special"] else 4 for token in told["added_tokens"]}
    pieces = told["model"].get("byte_fallback", False)
    bytes_ = {f"<0x{n:02X}>" for n in range(256)} if pieces else set()
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_token_list(texts)
    writer.add_token_types([added.get(text, 6 if text in bytes_ else 1) for text in texts])
    if pieces:
        # The sooner two pieces merge, the better is what becomes of them.
        scores = {"".join(merge): -float(i) for i, merge in reversed(list(enumerate(told["model"]["merges"])))}
        writer.add_token_scores([scores.get(text, 0.0) for text in texts])
        writer.add_unk_token_id(vocabulary[told["model"]["unk_token"]])
    else:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in told["model"]["merges"]])


def small_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Give a tokenizer of bytes and one pair of them, cut into words as GPT-2's."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], chat_template=template)


def rewritten(leave_out: str = "", architecture: str = "", **facts: Any) -> Callable[[Path], None]:
    """Write the file anew without a tensor, by another architecture's name, or with more facts, as strings or numbers."""

    def rewrite(folder: Path) -> None:
        reader = gguf.GGUFReader(folder / "model.gguf")
        writer = gguf.GGUFWriter(folder / "other", architecture or "llama")
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture" and name not in facts:
                array = field.types[0] == gguf.GGUFValueType.ARRAY
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
        for name, value in facts.items():
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, kind)
        for tensor in reader.tensors:
            if tensor.name != leave_out:
                writer.add_tensor(tensor.name, tensor.data)
        if leave_out == "nothing":
            writer.add_tensor("blk.0.ffn_gate_exps.weight", reader.tensors[0].data)
        finish(writer)
        (folder / "other").rename(folder / "model.gguf")

    return rewrite
