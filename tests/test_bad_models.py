"""Models that cannot be loaded, asked for over a real socket: who asks is told what to do, and the others are served on."""

import asyncio
import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from LLM import loader
from tests import makers
from tests.conftest import eventually, running

BAD, GOOD = "acme/bad", "acme/good"
SETTINGS = {"device": "cpu", "dtype": "bfloat16", "kv_memory": 256 << 10, "memory": 1 << 20}
Break = Callable[[Path], object]  # what is done to the models' folder before the server starts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    makers.tiny_folder(root / GOOD)
    shutil.copytree(root / GOOD, root / BAD)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "models"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def cut_in_half(root: Path) -> None:
    weights = root / BAD / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def of_type(model_type: str | None) -> Break:
    def change(root: Path) -> None:
        config = json.loads((root / BAD / "config.json").read_text())
        known = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
        (root / BAD / "config.json").write_text(json.dumps(known | ({"model_type": model_type} if model_type else {})))

    return change


def without_tokenizer(root: Path) -> None:
    for file in (root / BAD).glob("tokenizer*"):
        file.unlink()


def pickled(root: Path) -> None:
    (root / BAD / "model.safetensors").rename(root / BAD / "pytorch_model.bin")


def larger(root: Path) -> None:
    tensors = load_file(root / BAD / "model.safetensors")
    save_file(tensors | {"more": torch.zeros(1 << 19, dtype=torch.bfloat16)}, root / BAD / "model.safetensors")


def linked(root: Path) -> None:
    (root / BAD).rename(root.parent / "elsewhere")
    (root / BAD).symlink_to(root.parent / "elsewhere")


def drop_in(root: Path, name: str, text: str) -> None:
    (root / f"{name}.py").write_text(f"from LLM._base_model_handler import BaseModelHandler\n{text}\n")


def claimed_twice(root: Path) -> None:
    for name in ("model_srv_one", "model_srv_two"):
        drop_in(root, name, f"class ModelHandler(BaseModelHandler):\n    also_listed_as = ('{BAD}',)")


def with_a_broken_drop_in(root: Path) -> None:
    drop_in(root, "model_srv_acme_bad", "class ModelHandler(BaseModelHandler")


CASES: dict[str, tuple[Break, str, str]] = {
    "truncated weights": (cut_in_half, "load_failed", "ends too early; copy it anew"),
    "no architecture": (of_type(None), "load_failed", "names no model_type; take the one that came with the weights"),
    "an unknown architecture": (of_type("zork"), "load_failed", "a newer transformers may know its architecture"),
    "no tokenizer": (without_tokenizer, "load_failed", "copy its tokenizer.json and tokenizer_config.json anew"),
    "pickled weights": (pickled, "load_failed", "convert them to safetensors"),
    "no memory": (larger, "load_failed", "raise --memory or lower --kv-memory"),
    "a link to elsewhere": (linked, "load_failed", "can move the model itself there"),
    "two drop-ins": (claimed_twice, "load_failed", "take away all but one of them"),
    "a broken drop-in": (with_a_broken_drop_in, "load_failed", "can mend it and restart"),
    "no folder": (lambda root: shutil.rmtree(root / BAD), "model_not_found", f"it has: {GOOD}, wsserver/echo"),
}


async def assert_told_and_others_served(root: Path, code: str, todo: str, meanwhile: Break = lambda root: None) -> None:
    async with running(GOOD, root, **SETTINGS) as server, server.client() as client:
        meanwhile(root)
        for id in ("first", "again"):
            await client.send(type="init", id=id, model=BAD)
            error: dict[str, Any] = await client.until("ready", "error", id=id)
            assert error.get("code") == code
            assert todo in error["message"]
            assert error["message"].isprintable()
            assert not [word for word in (str(root.parent), ".py", "Error:", "Traceback") if word in error["message"]]
        done = await client.generate(id="g", prompt="Why?", max_tokens=5, temperature=0, ignore_eos=True)
        assert (done["finish_reason"], done["usage"]["completion_tokens"]) == ("length", 5)
        assert [entry["id"] for entry in (await client.settle())["models"]] == [GOOD]


async def test_the_folder_that_is_broken_below_can_be_loaded(root: Path):
    async with running(BAD, root, **SETTINGS) as server, server.client() as client:
        assert (await client.generate(id="g", prompt="Why?", max_tokens=5, ignore_eos=True))["finish_reason"] == "length"


@pytest.mark.parametrize(("breaking", "code", "todo"), CASES.values(), ids=CASES)
async def test_who_asks_for_a_model_that_cannot_be_loaded_is_told_what_to_do_and_others_are_served(
    root: Path, breaking: Break, code: str, todo: str
):
    breaking(root)
    await assert_told_and_others_served(root, code, todo)


async def test_a_folder_that_is_gone_since_the_start_is_told(root: Path):
    await assert_told_and_others_served(
        root, "load_failed", "copy it anew", meanwhile=lambda root: shutil.rmtree(root / BAD)
    )


async def test_a_gpu_without_memory_is_told(root: Path, monkeypatch: pytest.MonkeyPatch):
    full = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.") for _ in range(2)]
    to = torch.Tensor.to

    def move(tensor: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        if full and "device" in how:
            raise full.pop()
        return to(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", move)
    await assert_told_and_others_served(root, "load_failed", "a smaller dtype may do, or fewer models beside it")
    assert not full


def lacking_a_tensor(root: Path) -> None:
    tensors = load_file(root / BAD / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, root / BAD / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("breaking", "kv_memory"), [(lacking_a_tensor, 1 << 18), (lambda root: None, 1)], ids=["a tensor missing", "no room"]
)
async def test_a_load_that_failed_holds_no_memory(root: Path, breaking: Break, kv_memory: int, quantization: str):
    breaking(root)
    async with running(BAD, root, **SETTINGS | {"kv_memory": kv_memory}) as server, server.client() as client:
        await client.send(type="init", id="first", quantization=quantization)  # bitsandbytes keeps some tables from then on
        await client.until("error", id="first")
        gc.collect()
        before = tensors()
        gc.disable()  # what only a collection finds stays for an unknown time
        try:
            await client.send(type="init", id="load", quantization=quantization)
            assert (await client.until("ready", "error", id="load"))["type"] == "error"
            await eventually(lambda: tensors() <= before)
        finally:
            gc.enable()


async def test_a_load_that_was_given_up_holds_no_memory(root: Path, monkeypatch: pytest.MonkeyPatch):
    reached, go_on = threading.Event(), threading.Event()

    def fused(model: object) -> tuple[str, ...]:
        reached.set()
        assert go_on.wait(30)
        return ()

    monkeypatch.setattr(loader, "fuse", fused)
    async with running(BAD, root, **SETTINGS) as server, server.client() as client:
        gc.collect()
        before = tensors()
        gc.disable()
        try:
            await client.send(type="init", id="load")
            await asyncio.to_thread(reached.wait, 30)
            assert not tensors() <= before
            await client.send(type="cancel", id="load")
            assert (await client.until("ready", "error", id="load"))["code"] == "cancelled"
            go_on.set()
            await eventually(lambda: tensors() <= before)
        finally:
            gc.enable()


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
async def test_a_model_that_was_unloaded_holds_no_memory(root: Path, quantization: str):
    async with running("wsserver/echo", root, **SETTINGS | {"keep_alive": 0.0}) as server, server.client() as client:
        await client.send(type="init", id="first", model=GOOD, quantization=quantization)
        await client.until("ready", id="first")
        await eventually(lambda: not server.models.status())
        gc.collect()
        before = tensors()
        gc.disable()
        try:
            await client.send(type="init", id="again", model=GOOD, quantization=quantization)
            assert (await client.until("ready", "error", id="again"))["type"] == "ready"
            await eventually(lambda: tensors() <= before)
        finally:
            gc.enable()


def tensors() -> set[int]:
    """Give where the tensors of this process are."""
    gc.unfreeze()  # what is frozen is not told
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
