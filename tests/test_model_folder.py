"""What a model folder is told to hold, and what is refused at a look."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from LLM.errors import Refused
from LLM.model_folder import read

TENSORS = {
    "model.embed_tokens.weight": torch.zeros(100, 8, dtype=torch.bfloat16),
    "model.layers.0.mlp.up_proj.weight": torch.zeros(64, 8, dtype=torch.bfloat16),
    "model.norm.weight": torch.zeros(8, dtype=torch.float32),
    "model.buffer": torch.zeros(5, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    write_config(tmp_path, model_type="llama", dtype="bfloat16")
    return tmp_path


def write_config(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_tells_its_family_its_numbers_and_its_sizes(folder: Path):
    found = read(folder)
    assert (found.family, found.dtype) == ("llama", "bfloat16")
    assert found.parameters == 100 * 8 + 64 * 8 + 8
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {name: tuple(t.shape) for name, t in TENSORS.items()}


def add_output_layer(folder: Path) -> None:
    """Put an output layer into a second file."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(100, 8)}, folder / "b.safetensors")


def test_weights_may_lie_in_many_files(folder: Path):
    add_output_layer(folder)
    found = read(folder)
    assert [file.name for file in found.files] == ["a.safetensors", "b.safetensors"]
    assert found.parameters == 2 * 100 * 8 + 64 * 8 + 8


def test_the_same_weights_in_another_layout_are_left_alone(folder: Path):
    save_file({"tok_embeddings.weight": torch.zeros(100, 8)}, folder / "consolidated.safetensors")
    assert [file.name for file in read(folder).files] == ["model.safetensors"]
    save_file({"model.embed_tokens.weight": torch.zeros(100, 8)}, folder / "model-00001-of-00001.safetensors")
    index({"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}})(folder)
    found = read(folder)
    assert [file.name for file in found.files] == ["model-00001-of-00001.safetensors"]
    assert found.parameters == 800


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"text_config": None}, None),
        ({}, None),
    ],
)
def test_the_makers_precision_is_where_they_wrote_it(folder: Path, config: dict[str, Any], dtype: str | None):
    write_config(folder, model_type="llama", **config)
    assert read(folder).dtype == dtype


def test_an_embedding_table_is_the_output_layer_where_there_is_no_other(folder: Path):
    assert read(folder).tied == 100 * 8
    add_output_layer(folder)
    assert read(folder).tied == 0


@pytest.mark.parametrize(
    ("dtype", "quantization", "size"),
    [
        ("float32", "none", 4 * 1320),
        ("bfloat16", "none", 2 * 1320),
        ("float16", "none", 2 * 1320),
        ("bfloat16", "int8", 64 * 8 + 2 * 808),
        ("float32", "nf4", 64 * 8 * 9 // 16 + 4 * 808),
        ("bfloat16", "fp4", 64 * 8 * 9 // 16 + 2 * 808),
    ],
)
def test_memory_is_that_of_the_precision(folder: Path, dtype: str, quantization: str, size: int):
    assert read(folder).memory(dtype, quantization) == size


def cut(folder: Path, bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes])


def only(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return rename


def index(content: Any) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text) and None


def header(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(100)) and None
    )


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"model'), "config.json cannot be read"),
    "a config of bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json cannot be read"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "names no model_type"),
    "no model_type": (lambda folder: write_config(folder, hidden_size=8), "names no model_type"),
    "a model_type of another kind": (lambda folder: write_config(folder, model_type=7), "names no model_type"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors file"),
    "pickled weights": (only("pytorch_model.bin"), "pickled.* convert them to safetensors"),
    "a pickled checkpoint": (only("consolidated.00.pth"), "pickled.* convert them to safetensors"),
    "a file missing": (index({"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}), "1 of the .* missing"),
    "half an index": (index('{"weight_map": {'), "index of its weights"),
    "an index of another kind": (index([1]), "index of its weights"),
    "an index without its map": (index({}), "index of its weights"),
    "weights without their last byte": (lambda folder: cut(folder, -1), "ends too early"),
    "half a header": (lambda folder: cut(folder, 40), "damaged"),
    "half a size": (lambda folder: cut(folder, 5), "damaged"),
    "empty weights": (lambda folder: cut(folder, 0), "damaged"),
    "a header that is a list": (header(b"[]"), "damaged"),
    "a tensor without a place": (header(b'{"a": {"dtype": "F32", "shape": [1]}}'), "damaged"),
    "a tensor beyond the end": (
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 101]}}'),
        "ends too early",
    ),
    "a page of another server": (lambda folder: (folder / "model.safetensors").write_text("<html>" * 99), "damaged"),
    "no folder": (lambda folder: [path.unlink() for path in folder.iterdir()] and folder.rmdir(), "cannot be read"),
}


@pytest.mark.parametrize(("breaking", "why"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_loaded_is_refused_with_the_reason(folder: Path, breaking: Callable[[Path], object], why: str):
    breaking(folder)
    with pytest.raises(Refused, match=why) as refused:
        read(folder)
    assert refused.value.reason == "load_failed"
    assert str(folder) not in refused.value.message
