"""A model's files are replaced while it is loaded, or while it runs: nothing is mapped, and no mix is served."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from LLM._base_model_handler import LoadedModel, LoadOptions
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.scheduler import Scheduler
from LLM.errors import Refused
from LLM.loader import load
from LLM.loading.steady_file import SteadyFile
from tests import makers
from tests.gguf_writer import write_gguf

CPU = LoadOptions(device="cpu", dtype="float32", kv_memory=1 << 20)
WEIGHTS = {"safetensors": "model.safetensors", "gguf": "model.gguf"}


def silent(stage: str, done: float) -> None:
    """Take no notice."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    makers.tied_folder(root / "acme" / "safetensors", LlamaConfig, makers.SIZES, torch.float32)
    (root / "acme" / "gguf").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(root / "acme" / "safetensors" / file, root / "acme" / "gguf")
    write_gguf(root / "acme" / "gguf" / "model.gguf", root / "acme" / "safetensors")
    return root


@pytest.fixture(params=WEIGHTS)
def folder(made: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(made, tmp_path / "models")
    return Path(tmp_path / "models" / "acme" / request.param)


def weights_of(folder: Path) -> Path:
    return folder / WEIGHTS[folder.name]


def overwrite(path: Path) -> None:
    """Write other numbers over a file in place, as `cp` does: it is cut first."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    later(path)


def later(path: Path) -> None:
    """Give a file another time, also where the system's clock is coarse."""
    now = path.stat()
    os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns + 1_000_000_000))


def replace(path: Path) -> None:
    """Put another file of the same content in a file's place, as `mv` and `rsync` do."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def truncate(path: Path) -> None:
    """Cut a file short."""
    os.truncate(path, path.stat().st_size // 2)


def greedy(model: LoadedModel, meanwhile: Callable[[], object] = lambda: None) -> list[int]:
    runner = model.runner
    scheduler = Scheduler(1, BlockPool(runner.block_count, runner.block_size), Pacing(runner.max_prefill))
    sequence = scheduler.add(GenerationRequest("k", tuple(range(40, 60)), 30, Sampling(temperature=0)))
    while sequence.completion_tokens < 30:
        if sequence.completion_tokens == 10:
            meanwhile()
        batch = scheduler.next_batch()
        sequence.token_ids += [token.token_id for token in runner.step(batch) if token and token.token_id is not None]
        scheduler.retire(batch)
    return sequence.completion_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_folder_is_mapped_or_open_after_a_load(folder: Path, dtype: str):
    mapped: list[bool] = []
    model = load(
        folder, LoadOptions(device="cpu", dtype=dtype, kv_memory=1 << 20), lambda *_: mapped.append(is_mapped(folder))
    )
    assert not any(mapped)
    assert not is_mapped(folder)
    files = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
    ]
    assert not [file for file in files if file.startswith(str(folder))]
    assert greedy(model)


def is_mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("change", [overwrite, truncate, Path.unlink])
def test_a_running_model_goes_on_as_it_was_when_its_file_changes(folder: Path, change: Callable[[Path], object]):
    model = load(folder, CPU, silent)
    alone = greedy(model)
    assert greedy(model, meanwhile=lambda: change(weights_of(folder))) == alone


@pytest.mark.parametrize("change", [overwrite, truncate, replace, Path.unlink])
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_a_change_of_the_weights_during_a_load_is_refused_by_name(folder: Path, change: Callable[[Path], object], at: float):
    done = False

    def progress(stage: str, share: float) -> None:
        nonlocal done
        if stage == "weights" and share >= at and not done:
            done = True
            change(weights_of(folder))

    with pytest.raises(Refused, match=rf"{WEIGHTS[folder.name]} changed while it was being loaded; try again") as refused:
        load(folder, CPU, progress)
    assert refused.value.reason == "load_failed"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_change_of_another_file_during_a_load_is_refused_by_name(folder: Path, name: str):
    def progress(stage: str, share: float) -> None:
        if stage == "warmup" and share == 0:
            later(folder / name)

    with pytest.raises(Refused, match=f"{name} changed while it was being loaded; try again"):
        load(folder, CPU, progress)


def test_after_a_refusal_the_new_file_can_be_loaded(folder: Path):
    with pytest.raises(Refused):
        load(folder, CPU, lambda stage, share: replace(weights_of(folder)) if (stage, share) == ("weights", 0) else None)
    assert greedy(load(folder, CPU, silent))


def test_a_file_that_gets_shorter_is_told_by_a_short_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100))
    with SteadyFile(path) as file:
        assert file.read(100, 0) == bytes(100)
        truncate(path)
        with pytest.raises(Refused, match="changed"):
            file.read(100, 0)


# Where a folder's files may lead.


@pytest.mark.parametrize("name", ["weights", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_out_of_the_models_folder_is_refused_by_name_and_one_within_it_is_fine(folder: Path, name: str):
    file = weights_of(folder) if name == "weights" else folder / name
    root = folder.parent.parent
    within, without = root / ".cache" / "blob", root.parent / "elsewhere"
    within.parent.mkdir()
    file.rename(within)
    file.symlink_to(within)
    assert greedy(load(folder, CPU, silent))
    within.rename(without)
    file.unlink()
    file.symlink_to(without)
    with pytest.raises(Refused, match=f"{file.name} is a link that leads out of the models' folder") as refused:
        load(folder, CPU, silent)
    assert str(root.parent) not in refused.value.message
    assert json.dumps(refused.value.message)
