import hashlib
import subprocess
from pathlib import Path

import pytest

from LLM.hub_files import HubFile, NotFetched, choose, size
from tests.hub import blob_id

SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE"]
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

FOR_TOKENIZER_OR_READER = [
    *("tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "merges.txt", "qwen.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json"),
    *("LICENSE.txt", "USE_POLICY.md"),
]
NEVER = [
    *("pytorch_model.bin", "model.pt", "flax_model.msgpack", "tf_model.h5", "model.onnx", "training_args.bin"),
    *("consolidated.00.pth", "consolidated.safetensors", "model.fp16.safetensors", "model.gguf", INDEX),
    *("onnx/config.json", "onnx/model.safetensors", "original/tokenizer.model", "original/params.json"),
    *("modeling_x.py", "tokenizer.model.py", "tokenizer.model.bin", "LICENSE.py", "pytorch_model.bin.index.json"),
    *(".gitattributes", "figure.png"),
]


def chosen(*paths: str, file: str | None = None) -> set[str]:
    return {f.path for f in choose([HubFile(path, 1, "0" * 40) for path in paths], file)}


def refused(*paths: str, file: str | None = None) -> str:
    with pytest.raises(NotFetched) as failed:
        chosen(*paths, file=file)
    assert "\n" not in str(failed.value)
    return str(failed.value)


def test_a_models_folder_is_its_weights_and_what_is_read_beside_them():
    assert chosen(*SMALL, "model.safetensors") == {*SMALL, "model.safetensors"}


@pytest.mark.parametrize("name", FOR_TOKENIZER_OR_READER)
def test_what_a_tokenizer_or_a_reader_needs_is_taken(name: str):
    assert name in chosen(*SMALL, "model.safetensors", name)


@pytest.mark.parametrize("name", NEVER)
def test_code_pickles_and_other_copies_of_the_weights_are_not_taken(name: str):
    assert chosen(*SMALL, "model.safetensors", name) == {*SMALL, "model.safetensors"}


def test_shards_come_with_their_index_and_without_the_same_weights_in_one_file():
    together = chosen(*SMALL, *SHARDS, INDEX, "model.safetensors", "consolidated-00001-of-00001.safetensors")
    assert together == {*SMALL, *SHARDS, INDEX}


def test_shards_that_no_index_puts_together_are_not_taken_where_there_is_one_file():
    assert chosen(*SMALL, *SHARDS, "model.safetensors") == {*SMALL, "model.safetensors"}


def test_weights_of_another_name_are_taken_if_there_are_no_others():
    assert chosen(*SMALL, "weights.safetensors", "consolidated.safetensors") == {*SMALL, "weights.safetensors"}


def test_what_is_small_comes_first():
    files = [HubFile(path, 1, "0" * 40) for path in ("model.safetensors", "config.json", "tokenizer.json")]
    assert [file.path for file in choose(files)] == ["config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize(
    "weights",
    [[], ["pytorch_model.bin"], ["consolidated.safetensors"], ["original/model.safetensors"], ["model.onnx", "tf_model.h5"]],
)
def test_a_repository_without_weights_to_take_is_refused(weights: list[str]):
    assert "no safetensors or GGUF weights" in refused(*SMALL, *weights)


def test_an_adapter_is_refused():
    assert "no safetensors" in refused("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert "no config.json" in refused("README.md", "model.safetensors")


# GGUF.


def test_the_only_gguf_file_is_taken():
    assert chosen(*SMALL, "x.gguf") == {*SMALL, "x.gguf"}


def test_of_several_gguf_files_one_has_to_be_chosen_by_the_name_that_is_shown():
    paths = ["README.md", "config.json", "x-Q4_K_M.gguf", "q8/x-Q8_0.gguf"]
    message = refused(*paths)
    assert "--file" in message
    for name in paths[2:]:
        assert f"{name} (1 bytes)" in message
        assert chosen(*paths, file=name) == {"README.md", "config.json", name}


def test_a_gguf_file_in_parts_is_one():
    parts = [f"q8/x-Q8-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert chosen("config.json", *parts) == {"config.json", *parts}
    assert chosen("config.json", *parts, "x-Q4.gguf", file=parts[1]) == {"config.json", *parts}
    assert f"{parts[0]} (3 bytes), x-Q4.gguf (1 bytes)" in refused("config.json", *parts, "x-Q4.gguf")


def test_a_gguf_file_beside_safetensors_is_taken_if_it_is_named():
    assert chosen(*SMALL, "model.safetensors", "x.gguf", file="x.gguf") == {*SMALL, "x.gguf"}


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    assert "choose one of x.gguf" in refused(*SMALL, "model.safetensors", "x.gguf", file="y.gguf")
    assert "leave --file out" in refused(*SMALL, "model.safetensors", file="model.safetensors")


# A file's bytes.


def test_a_large_file_is_known_by_its_sha256_and_a_small_one_by_gits_blob_id(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    by_git = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()
    assert by_git == blob_id(b"content")
    for digest in (by_git, hashlib.sha256(b"content").hexdigest()):
        assert HubFile("file", 7, digest).is_copied_by(path)
        assert not HubFile("file", 8, digest).is_copied_by(path)
        path.write_bytes(b"Content")
        assert not HubFile("file", 7, digest).is_copied_by(path)
        path.write_bytes(b"content")


def test_a_files_name_in_a_model_folder_has_no_folder():
    assert HubFile("q8/../../x.gguf", 1, "0").name == "x.gguf"


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (1_234_567, "1.2 MB"),
        (14_483_498_224, "14.5 GB"),
        (2 * 10**12, "2.0 TB"),
    ],
)
def test_a_size_is_written_for_people(count: int, written: str):
    assert size(count) == written
