"""What a downloaded folder says about itself is checked before anything is built, and reaches neither a hub nor code."""

import gc
import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from LLM import gguf_file, loader, model_folder
from LLM._base_model_handler import LoadOptions
from LLM.errors import Refused
from LLM.loader import load
from LLM.loading.generation_values import checked
from LLM.loading.own_copy import cleaned
from LLM.loading.steady_file import SteadyFile
from LLM.placement import plan
from tests import makers

CPU = LoadOptions(device="cpu", dtype="float32", kv_memory=1 << 20)


def silent(stage: str, done: float) -> None:
    """Take no notice."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return makers.tied_folder(tmp_path / "acme" / "model", LlamaConfig, makers.SIZES, torch.float32)


def state(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))


# Sizes.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 20_000),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 1e300),
        ("vocab_size", 10**9),
        ("hidden_size", 10**6),
    ],
)
def test_a_size_that_the_weights_contradict_is_refused_by_name_before_anything_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: float
):
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_: pytest.fail("a model was built"))
    state(folder, "config.json", **{field: value})
    for look in (lambda: plan(folder, CPU), lambda: load(folder, CPU, silent)):
        with pytest.raises(Refused, match=f"its config.json has a {field} of") as refused:
            look()
        assert refused.value.reason == "load_failed"


def test_layers_that_are_a_few_numbers_each_are_refused_too(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tiny = {f"model.layers.{n}.input_layernorm.weight": torch.zeros(64) for n in range(2, 900)}
    save_file(tensors | tiny, folder / "model.safetensors", {"format": "pt"})
    state(folder, "config.json", num_hidden_layers=900)
    with pytest.raises(Refused, match="lacks some of its tensors"):
        load(folder, CPU, silent)


def test_tensors_that_are_missing_are_refused_before_any_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "_model", lambda *_: pytest.fail("weights were read"))
    state(folder, "config.json", tie_word_embeddings=False, intermediate_size=256)
    with pytest.raises(Refused, match="lacks some of its tensors"):
        load(folder, CPU, silent)


def test_one_stretch_of_a_file_cannot_be_many_tensors(folder: Path):
    header = {f"t{n}": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for n in range(1000)}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(Refused, match="damaged"):
        model_folder.read(folder)


# Keys that reach out.

REACHING = {
    "attn_implementation": "evil/kernels",
    "_attn_implementation": "evil/kernels",
    "_attn_implementation_internal": "evil/kernels",
    "experts_implementation": "evil/kernels",
    "auto_map": {"AutoConfig": "evil/repo--code.Config", "AutoTokenizer": ["evil/repo--code.T", None]},
    "trust_remote_code": True,
    "custom_generate": "evil/repo",
    "_name_or_path": "evil/repo",
    "base_model_name_or_path": "evil/repo",
    "tokenizer_file": "/etc/hostname",
    "gguf_file": "/etc/hostname",
    "vocab_file": "/etc/hostname",
    "transformers_weights": "evil/repo",
    "fusion_config": {"evil": True},
    "use_kernels": True,
    "_commit_hash": "0" * 40,
}


def test_what_reaches_out_is_left_out_also_of_nested_parts_and_the_rest_stays():
    kept = {"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}
    assert cleaned(REACHING | kept | {"text_config": REACHING | kept}) == kept | {"text_config": kept}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_folder_with_every_such_key_is_loaded_as_if_it_had_none(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    seen: list[object] = []
    init = LlamaForCausalLM.__init__

    def construct(model: LlamaForCausalLM, config: LlamaConfig) -> None:
        seen.append((config._attn_implementation, getattr(config, "auto_map", None), config.name_or_path))
        init(model, config)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", construct)
    load(folder, CPU, silent)
    expected = list(seen)
    seen.clear()
    state(folder, file, **REACHING)
    load(folder, CPU, silent)
    assert [found[:2] for found in seen] == [found[:2] for found in expected]
    assert not [found for found in seen if "evil" in str(found)]


def test_an_adapter_is_not_looked_at(folder: Path):
    state(folder, "adapter_config.json", base_model_name_or_path="evil/repo", peft_type="LORA")
    load(folder, CPU, silent)


# Values of generation_config.json.

BAD: dict[str, list[object]] = {
    "temperature": ["hot", float("nan"), float("inf"), -1, 11, True, [0.5]],
    "top_p": [0, 1.5, "all", {}],
    "top_k": [-1, 2**31, 1.5, "many"],
    "min_p": [-0.1, 2, []],
    "repetition_penalty": [0, -1, 10**400, "much"],
    "eos_token_id": [-1, 10**9, "end", 1.5, True, [1, 10**9], {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_default_is_ignored_with_a_note(name: str, value: object):
    values, notes = checked({name: value}, vocabulary=100)
    assert values == {"eos_token_id": [1] if value == [1, 10**9] else None}
    assert len(notes) == 1
    assert name in notes[0]


def test_good_defaults_are_taken_as_they_are():
    stated = {"temperature": 0.7, "top_p": 1, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.1, "eos_token_id": [3, 4]}
    assert checked(stated | {"do_sample": True}, vocabulary=100) == (stated, [])


def test_a_model_with_bad_defaults_is_served_and_tells(folder: Path):
    state(folder, "generation_config.json", temperature="hot", top_k=-1, eos_token_id=[10**9, 3])
    model = load(folder, CPU, silent)
    assert model.generation_config == {"eos_token_id": [3]}
    assert model.end_token_ids == {3}
    assert [note.split()[1] for note in model.runner.notes] == ["temperature", "top_k", "an"]


# GGUF headers.

MAGIC = struct.pack("<4sI", b"GGUF", 3)


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def header(*facts: bytes) -> bytes:
    return MAGIC + struct.pack("<QQ", 0, len(facts)) + b"".join(facts)


def fact(name: str, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


ARCHITECTURE = fact("general.architecture", 8, text("llama"))


@pytest.mark.parametrize(
    ("element", "content", "count"),
    [(0, bytes(1 << 20), 1 << 20), (4, bytes(4 << 18), 1 << 18), (8, text("ab") * 100_000, 100_000)],
    ids=["bytes", "numbers", "strings"],
)
def test_arrays_take_about_as_much_memory_as_in_the_file(tmp_path: Path, element: int, content: bytes, count: int):
    path = tmp_path / "model.gguf"
    path.write_bytes(header(ARCHITECTURE, fact("a", 9, struct.pack("<IQ", element, count) + content)))
    gc.collect()
    tracemalloc.start()
    found = gguf_file.read(SteadyFile(path))
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.metadata["a"]) == count
    assert kept < 1.2 * len(content) + 100_000
    assert most < 3 * len(content) + 4 * gguf_file.PIECE


@pytest.mark.parametrize("element", [0, 5, 8, 12])
@pytest.mark.parametrize("count", [10**6, 2**62, 2**64 - 1])
def test_an_array_longer_than_its_file_is_damage(tmp_path: Path, element: int, count: int):
    path = tmp_path / "model.gguf"
    path.write_bytes(header(ARCHITECTURE, fact("a", 9, struct.pack("<IQ", element, count) + bytes(1000))))
    with pytest.raises(ValueError, match="damaged"):
        gguf_file.read(SteadyFile(path))


def test_texts_are_a_sequence_like_any_other(tmp_path: Path):
    path, said = tmp_path / "model.gguf", ["", "a", "", "žluť", "😀", "z"]
    content = struct.pack("<IQ", 8, len(said)) + b"".join(map(text, said))
    path.write_bytes(header(ARCHITECTURE, fact("a", 9, content)))
    found = gguf_file.read(SteadyFile(path)).metadata["a"]
    assert list(found) == said == [found[i] for i in range(len(said))]
    assert [found[-1], found[-6], found[1:4]] == ["z", "", said[1:4]]
    with pytest.raises(IndexError):
        found[6]


def test_an_architecture_that_is_no_word_is_shown_escaped_and_short(tmp_path: Path):
    folder = tmp_path / "acme" / "model"
    folder.mkdir(parents=True)
    evil = "<script>\n\x1b[31m\u202e" + "x" * 10_000
    (folder / "model.gguf").write_bytes(header(fact("general.architecture", 8, text(evil))))
    with pytest.raises(Refused, match="is of the architecture") as refused:
        model_folder.read(folder)
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 400
