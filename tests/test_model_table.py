"""The table of the models there are: what it tells of each, how it is set, and that no folder spoils it for the others."""

import json
import logging
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from LLM import placement
from LLM._base_model_handler import BaseModelHandler, LoadOptions, Plan
from LLM.drop_ins import DropIn
from LLM.listing import TWICE, list_models
from LLM.model_table import HEADINGS, UNREADABLE, table
from tests.conftest import add_folder

CPU = LoadOptions(dtype="float32", device="cpu")


class TwoNames(BaseModelHandler):
    also_listed_as = ("acme/tiny", "acme/small")


class Echo(BaseModelHandler):
    model_ids = ("no/folder",)


class Odd(BaseModelHandler):
    def plan(self, folder: Path, options: LoadOptions) -> Plan:
        raise ZeroDivisionError


class Unmade(BaseModelHandler):
    def __init__(self) -> None:
        raise ZeroDivisionError


DROP_INS = {
    "model_srv_acme_tiny": DropIn(TwoNames),
    "model_srv_echo": DropIn(Echo),
    "model_srv_acme_odd": DropIn(Odd),
    "model_srv_acme_unmade": DropIn(Unmade),
}


def add_model(root: Path, name: str) -> None:
    """Put a folder of 3,000,000 numbers of 16 bits there; it is good enough for all but a load."""
    add_folder(root, name)
    (root / name / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    weights = {"model.layers.0.mlp.up_proj.weight": torch.zeros(1000, 3000, dtype=torch.bfloat16)}
    save_file(weights, root / name / "model.safetensors", {"format": "pt"})


def cells(root: Path, options: LoadOptions = CPU, memory: int | None = None) -> dict[str, list[str]]:
    """Give the columns of each model's row, the last one whole."""
    rows, _, _ = table(list_models(root, DROP_INS), options, memory).partition("\n\n")
    return {line.split()[0]: line.split(maxsplit=8) for line in rows.splitlines()}


def test_a_model_is_told_with_what_it_takes(tmp_path: Path):
    add_model(tmp_path, "acme/tiny")
    found = cells(tmp_path)
    assert found["MODEL"] == ["MODEL", "ALSO", "FAMILY", "PARAMETERS", "DISK", "PRECISION", "WEIGHTS", "KV-CACHE", "FITS"]
    row = ["acme/tiny", "acme/small", "llama", "3.0M", "5.7MiB", "float32", "11.4MiB", "1.0GiB", "yes"]
    assert found["acme/tiny"] == row
    assert found["no/folder"] == ["no/folder", *"-" * 7, "yes"]
    assert list(found) == ["MODEL", "acme/tiny", "no/folder"], "a second name has no row of its own"


def test_it_is_what_a_plan_says_of_the_same_options(tmp_path: Path):
    add_model(tmp_path, "acme/tiny")
    options = LoadOptions(dtype="bfloat16", device="cpu", kv_memory=5 << 20)
    assert cells(tmp_path, options)["acme/tiny"][5:] == ["bfloat16", "5.7MiB", "5.0MiB", "yes"]
    small, large = (3 * 2 * 10**6 + (5 << 20) + more for more in (-1, 0))
    assert cells(tmp_path, options, large)["acme/tiny"][-1] == "yes"
    assert "raise --memory" in cells(tmp_path, options, small)["acme/tiny"][-1]


def test_without_a_budget_given_it_is_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_model(tmp_path, "acme/tiny")
    for has, fits in ((2 << 30, True), (1 << 30, False)):
        monkeypatch.setattr(placement, "memory_of", lambda device, has=has: has)
        assert (cells(tmp_path)["acme/tiny"][-1] == "yes") == fits
    assert table(list_models(tmp_path, DROP_INS), CPU, None).endswith(
        "\n\nModels may take 921.6MiB together on cpu, weights and KV caches (--memory, --kv-memory)."
    )


def test_a_cache_on_a_gpu_takes_at_least_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_model(tmp_path, "acme/tiny")
    monkeypatch.setattr(placement, "device_of", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(placement, "memory_of", lambda device: 80 << 30)
    assert cells(tmp_path, LoadOptions())["acme/tiny"][5:] == ["bfloat16", "5.7MiB", "1.0GiB+", "yes"]
    assert cells(tmp_path, LoadOptions(kv_memory=2 << 30))["acme/tiny"][7] == "2.0GiB"


def test_what_is_wrong_with_one_is_told_and_the_others_are_there(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("acme/pickled", "acme/odd", "acme/unmade", "acme/tiny"):
        add_model(tmp_path, name)
    (tmp_path / "acme" / "pickled" / "model.safetensors").rename(tmp_path / "acme" / "pickled" / "model.bin")
    add_folder(tmp_path, "acme/empty")
    found = cells(tmp_path)
    assert "names no model_type" in found["acme/empty"][-1]
    assert "convert them to safetensors" in found["acme/pickled"][-1]
    assert found["acme/odd"][-1] == found["acme/unmade"][-1] == f"no: {UNREADABLE}"
    assert [record.exc_info is not None for record in caplog.records if record.levelno >= logging.ERROR] == [True] * 2
    assert found["acme/tiny"][-1] == "yes"


def test_what_the_listing_refuses_is_told(tmp_path: Path):
    drop_ins = DROP_INS | {"model_srv_more": DropIn(Echo), "model_srv_acme_broken": DropIn(BaseModelHandler, "not so")}
    add_model(tmp_path, "acme/broken")
    rows = table(list_models(tmp_path, drop_ins), CPU, None).splitlines()
    assert [row.split("  no: ")[1:] for row in rows] == [[], ["not so"], [TWICE]]


def test_the_columns_stand_in_line(tmp_path: Path):
    for name in ("a/b", "acme/a-rather-long-name"):
        add_model(tmp_path, name)
    lines = table(list_models(tmp_path, {}), CPU, None).partition("\n\n")[0].splitlines()
    assert len({line.index(word) for line, word in zip(lines, ("FITS", "yes", "yes"), strict=True)}) == 1
    assert len({line.index(word) + len(word) for line, word in zip(lines, ("DISK", "5.7MiB", "5.7MiB"), strict=True)}) == 1
    assert not [line for line in lines if line != line.rstrip()]


def test_a_device_that_is_not_there_is_told(tmp_path: Path):
    add_model(tmp_path, "acme/tiny")
    assert "CUDA devices, not cuda:99" in cells(tmp_path, LoadOptions(device="cuda:99"))["acme/tiny"][-1]


def test_no_models_are_no_rows():
    assert table({}, CPU, None).split() == list(astuple(HEADINGS))
