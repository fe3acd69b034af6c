"""Models that come and go leave nothing: no frozen objects, no object of theirs, and free pages go back to the system."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from LLM.loading import memory
from tests import makers
from tests.conftest import eventually, running


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def models() -> list[LlamaForCausalLM]:
    """Give those of this process."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), LlamaForCausalLM)]


async def test_loads_and_unloads_freeze_nothing_more_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    makers.tied_folder(tmp_path / "acme" / "model", LlamaConfig, makers.SIZES)
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "_malloc_trim", lambda: trimmed.append)
    frozen: list[int] = []
    others = models()
    settings = {"device": "cpu", "dtype": "float32", "kv_memory": 1 << 20, "keep_alive": 0.0}
    async with running("wsserver/echo", tmp_path, **settings) as server, server.client() as client:
        for n in range(4):
            await client.send(type="init", id=str(n), model="acme/model")
            assert (await client.until("ready", "error", id=str(n)))["type"] == "ready"
            await eventually(lambda: not server.models.status())
            await eventually(lambda n=n: len(trimmed) > n)
            frozen.append(gc.get_freeze_count())
    assert frozen == sorted(frozen, reverse=True), "what was frozen before may go, and nothing comes"
    gc.collect()
    assert not [model for model in models() if not any(model is other for other in others)]
    assert trimmed == [0] * len(trimmed)


def test_libraries_are_frozen_once_per_process():
    memory.freeze_libraries()
    before = gc.get_freeze_count()
    kept = [[n] for n in range(1000)]
    memory.freeze_libraries()
    assert gc.get_freeze_count() <= before
    assert kept


def test_giving_back_works_where_glibc_is_and_where_it_is_not(monkeypatch: pytest.MonkeyPatch):
    memory.give_back()
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.give_back()
