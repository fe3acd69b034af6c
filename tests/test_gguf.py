"""Folders of one GGUF file: what they become, and what is refused. Small models, written as llama.cpp's conversion does."""

import gc
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from LLM import gguf_file, model_folder
from LLM._base_model_handler import LoadOptions
from LLM.errors import Refused
from LLM.gguf_config import config_of
from LLM.gguf_file import PACKINGS
from LLM.loader import load
from LLM.loading.steady_file import SteadyFile
from LLM.placement import plan
from tests.gguf_writer import Packing, rewritten, small_tokenizer, write_gguf
from tests.test_loader import assert_fit_for_any_client, changed, greedy, save_random_weights, silent, text_of, without

CPU = LoadOptions(device="cpu", dtype="float32", kv_memory=1 << 20)
SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 258,
    "eos_token_id": 259,
}
REAL = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
REAL_ONE = "Llama with a real tokenizer"
TIED, APART = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NEAR = {"layer_types": ["sliding_attention", "sliding_attention"], "sliding_window": 8, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES, **TIED, rope_theta=100000.0),
    "Llama with an output layer and biases": LlamaConfig(**SIZES, **APART, attention_bias=True),
    "Llama whose heads are all its own": LlamaConfig(**SIZES | {"num_key_value_heads": 4}, **TIED),
    "Llama stretched to longer texts": LlamaConfig(**SIZES, **TIED, rope_parameters=STRETCHED),
    "Qwen2": Qwen2Config(**SIZES, **APART),
    "Qwen3": Qwen3Config(**SIZES, **TIED),
    REAL_ONE: LlamaConfig(**SIZES | REAL, **TIED),
    "Gemma 3": Gemma3TextConfig(**SIZES, **TIED, **NEAR),
}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory, default_model_folder: Path) -> Callable[[str], tuple[Path, Path]]:
    """Gives a model's folder of safetensors, and that of the GGUF file made from it."""
    root = tmp_path_factory.mktemp("twins")

    def make(name: str) -> tuple[Path, Path]:
        folder, packed = root / name / "safetensors", root / name / "gguf"
        if not folder.exists():
            packed.mkdir(parents=True)
            save_random_weights(folder, CONFIGS[name])
            template = (default_model_folder / "chat_template.jinja").read_text()
            small_tokenizer(template).save_pretrained(folder)
            if name == REAL_ONE:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(default_model_folder / file, folder)
            write_gguf(packed / "model.gguf", folder, pre="smollm" if name == REAL_ONE else "gpt-2")
        return folder, packed

    return make


@pytest.fixture
def folder(twins: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Path:
    """The GGUF file of a small Llama, alone in its folder."""
    return Path(shutil.copytree(twins("Llama")[1], tmp_path / "acme" / "tiny"))


# What a GGUF file gives.


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_says_what_the_model_says_that_it_was_made_from(twins: Callable[[str], tuple[Path, Path]], name: str):
    model, packed = (load(folder, CPU, silent) for folder in twins(name))
    assert greedy(packed) == greedy(model)
    assert (packed.vocabulary_size, packed.context_length) == (model.vocabulary_size, 128)
    assert packed.end_token_ids >= model.end_token_ids
    assert packed.runner.memory_bytes == model.runner.memory_bytes


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_gguf_file_is_quantised_as_any_other_model(twins: Callable[[str], tuple[Path, Path]], quantization: str):
    stages: list[str] = []
    options = replace(CPU, quantization=quantization)
    model, packed = (load(folder, options, lambda stage, _: stages.append(stage)) for folder in twins("Llama"))
    assert greedy(packed) == greedy(model)
    assert packed.runner.memory_bytes == model.runner.memory_bytes
    assert stages.count("quantise") > 20
    told = [model_folder.read(folder).memory("bfloat16", quantization) for folder in twins("Llama")]
    assert told[0] == told[1]


@pytest.mark.parametrize(("name", "block", "size"), PACKINGS.values(), ids=lambda part: str(part))
def test_every_packing_is_known_as_the_gguf_package_knows_it(name: str, block: int, size: int):
    kind = Packing[name]
    assert PACKINGS[kind] == (name, *gguf.GGML_QUANT_SIZES[kind])
    assert gguf.dequantize(np.zeros((2, size), np.uint8), kind).shape == (2, block)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_takes_is_told_beforehand(twins: Callable[[str], tuple[Path, Path]], name: str):
    folder, packed = twins(name)
    assert model_folder.read(packed).parameters == model_folder.read(folder).parameters
    assert model_folder.read(packed).tied == model_folder.read(folder).tied
    for options in (CPU, replace(CPU, dtype="bfloat16")):
        loaded = load(packed, options, silent)
        assert plan(packed, options).memory_bytes == pytest.approx(loaded.runner.memory_bytes, rel=0.1)


def test_a_conversation_is_written_as_by_the_models_own_folder_and_ends_as_there(
    twins: Callable[[str], tuple[Path, Path]],
):
    model, packed = (load(folder, CPU, silent) for folder in twins(REAL_ONE))
    said = ("user", "Why? <|im_end|> 2026  žluťoučký 😀")
    assert text_of(packed, said) == text_of(model, said)
    assert packed.end_token_ids == {0, 2}
    assert [packed.tokenizer.id_to_token(i) for i in (0, 2)] == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "packing", [Packing.F16, Packing.BF16, Packing.Q8_0, Packing.Q4_1, Packing.Q5_0], ids=lambda p: p.name
)
def test_packed_weights_are_those_that_the_gguf_package_unpacks(
    twins: Callable[[str], tuple[Path, Path]], tmp_path: Path, packing: Packing
):
    folder, _ = twins("Gemma 3")
    file = write_gguf(tmp_path / "model.gguf", folder, packing)
    found = model_folder.read(tmp_path)
    assert found.dtype == ("float16" if packing is Packing.F16 else "bfloat16")
    model = load(tmp_path, CPU, silent).runner._model.model
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    stored = tensors["blk.1.ffn_down.weight"]
    plain = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    assert torch.equal(model.layers[1].mlp.down_proj.weight.to_dense(), plain)
    table = tensors["token_embd.weight"]
    plain = torch.from_numpy(gguf.dequantize(table.data, table.tensor_type).copy())
    assert torch.equal(model.embed_tokens.weight, plain)


def test_the_models_own_files_count_more_than_what_its_gguf_file_says(
    twins: Callable[[str], tuple[Path, Path]], folder: Path
):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(twins("Llama")[0] / name, folder)
    changed("config.json", max_position_embeddings=64)(folder)
    changed("generation_config.json", eos_token_id=[7, 8])(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    model = load(folder, CPU, silent)
    assert (model.context_length, model.end_token_ids) == (64, {7, 8})
    assert text_of(model, ("user", "Why?")) == "Why?!"


def test_progress_is_by_bytes_and_what_it_raises_ends_the_load_and_leaves_nothing(folder: Path):
    class GivenUp(Exception):
        pass

    told: list[tuple[str, float]] = []
    load(folder, CPU, lambda stage, progress: told.append((stage, progress)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == ["config", "weights", "warmup"]
    weights = [progress for stage, progress in told if stage == "weights"]
    assert weights == sorted(weights)
    assert len(set(weights)) > 15
    assert (weights[0], weights[-1]) == (0, 1)

    def give_up(stage: str, progress: float) -> None:
        if stage == "weights" and progress == 1:
            raise GivenUp

    before = tables()
    with pytest.raises(GivenUp):
        load(folder, CPU, give_up)
    assert tables() == before


def tables() -> int:
    """How many tensors there are of the size of the embedding table."""
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.numel() == 288 * 32)


# What is refused.


def packed_as(number: int) -> Callable[[Path], None]:
    """Name another packing of the output's norm, by its number in the file."""

    def change(folder: Path) -> None:
        content = bytearray((folder / "model.gguf").read_bytes())
        name = content.index(b"output_norm.weight") + len("output_norm.weight")
        content[name + 12 : name + 16] = struct.pack("<I", number)  # behind one dimension
        (folder / "model.gguf").write_bytes(content)

    return change


def cut_to(size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.gguf").write_bytes((folder / "model.gguf").read_bytes()[:size]) and None


def holding(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.gguf").write_bytes(content) and None


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a second file": (lambda folder: shutil.copy(folder / "model.gguf", folder / "q4.gguf"), "2 GGUF files; leave the one"),
    "one of several": (rewritten(**{"split.count": 2}), "join them with llama-gguf-split"),
    "weights without their last byte": (cut_to(-1), "ends too early; copy it anew"),
    "no weights": (cut_to(30_000), "ends too early|damaged"),
    "half a header": (cut_to(2000), "damaged; copy it anew"),
    "half a number": (cut_to(5), "damaged; copy it anew"),
    "nothing": (holding(b""), "damaged; copy it anew"),
    "a page of another server": (holding(b"<html>" * 99), "damaged; copy it anew"),
    "a version of the future": (holding(struct.pack("<4sIQQ", b"GGUF", 9, 0, 0)), "damaged; copy it anew"),
    "no facts": (holding(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)), "damaged; copy it anew"),
    "a count without an end": (holding(struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 2**63)), "damaged; copy it anew"),
    "a packing of the future": (packed_as(99), "packed in a way that is not known here; take one"),
    "another architecture": (rewritten(architecture="falcon"), 'architecture "falcon".* safetensors folder'),
    "no sizes": (rewritten(architecture="qwen2"), "does not tell the model's sizes"),
    "no context length": (rewritten(**{"llama.context_length": "long"}), "does not tell the model's sizes"),
    "stretched positions": (rewritten(**{"llama.rope.scaling.type": "yarn"}), "stretches .* config.json beside it"),
    "a tensor too few": (rewritten(leave_out="blk.1.ffn_up.weight"), "lacks some of its tensors"),
    "no embedding table": (rewritten(leave_out="token_embd.weight"), "does not tell the model's sizes"),
    "a tensor too many": (rewritten(leave_out="nothing"), "holds a tensor that is not known here"),
    "words cut in another way": (rewritten(**{"tokenizer.ggml.pre": "zork"}), '"zork".* tokenizer.json'),
    "another tokenizer": (rewritten(**{"tokenizer.ggml.model": "t5"}), "tokenizer of a kind"),
    "no tokenizer": (rewritten(**{"tokenizer.ggml.tokens": "none"}), "tokenizer of a kind.* tokenizer.json"),
    "a pickle beside it": (lambda f: (f / "model.gguf").rename(f / "model.bin"), "pickled|config.json cannot be read"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"model'), "config.json cannot be read"),
}


@pytest.mark.parametrize(("breaking", "why"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_loaded_is_refused_with_the_reason(folder: Path, breaking: Callable[[Path], object], why: str):
    breaking(folder)
    with pytest.raises(Refused, match=why) as refused:
        load(folder, CPU, silent)
    assert refused.value.reason == "load_failed"
    assert_fit_for_any_client(refused.value, folder)


def test_a_prompt_ends_where_the_metadata_says_and_at_well_known_tokens(folder: Path):
    rewritten(**{"tokenizer.ggml.eot_token_id": 11, "tokenizer.ggml.eom_token_id": 12})(folder)
    assert load(folder, CPU, silent).end_token_ids == {11, 12, 257, 259}


def test_llama_3s_stretch_is_known_by_what_it_comes_to(twins: Callable[[str], tuple[Path, Path]], tmp_path: Path):
    shutil.copytree(twins("Llama stretched to longer texts")[1], tmp_path, dirs_exist_ok=True)
    file = gguf_file.read(SteadyFile(tmp_path / "model.gguf"))
    assert config_of(file)["rope_parameters"] == pytest.approx(STRETCHED)
    (offset,) = (tensor.offset for tensor in file.tensors if tensor.name == "rope_freqs.weight")
    content = bytearray(file.path.read_bytes())
    content[offset : offset + 4] = struct.pack("<f", 1.5)
    file.path.write_bytes(content)
    with pytest.raises(Refused, match=r"stretches .* config.json beside it"):
        load(tmp_path, CPU, silent)


def test_safetensors_count_more_than_a_gguf_file_beside_them(twins: Callable[[str], tuple[Path, Path]], folder: Path):
    shutil.copytree(twins("Qwen3")[0], folder, dirs_exist_ok=True)
    assert model_folder.read(folder).family == "qwen3"
    without("model.safetensors")(folder)
    assert model_folder.read(folder).gguf
