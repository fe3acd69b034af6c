"""Models of 8 and 4 bits: both seed models from folder to socket, the default model's words, and the memory they save."""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor

from LLM import placement
from LLM._base_model_handler import LoadOptions
from LLM.errors import Refused
from LLM.loader import load
from LLM.quantize import settle
from tests import makers
from tests.conftest import DEFAULT_MODEL, running

CPU = LoadOptions(dtype="bfloat16", device="cpu", kv_memory=16 << 20, decode="eager")
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def silent(stage: str, progress: float) -> None:
    """Nobody wants to know."""


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    makers.mistral_folder(root / makers.MISTRAL)
    makers.llama_folder(root / makers.LLAMA)
    return root


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("model", [makers.MISTRAL, makers.LLAMA])
async def test_both_seed_models_stream_at_every_precision(root: Path, model: str, quantization: str):
    async with running(model, root, "bfloat16", device="cpu", kv_memory=16 << 20) as server, server.client() as client:
        await client.send(type="init", id="load", quantization=quantization)
        ready = await client.until("ready", "error", id="load")
        assert ready["model"] | {"context_length": 0} == {
            "id": model,
            "context_length": 0,
            "dtype": "bfloat16",
            "quantization": quantization,
            "device": "cpu",
        }
        done = await client.generate(id="chat", messages=CHAT, max_tokens=12, ignore_eos=True, temperature=0)
        assert done["usage"]["completion_tokens"] == 12
        again = await client.generate(id="again", messages=CHAT, max_tokens=12, ignore_eos=True, temperature=0)
        assert again["joined"] == done["joined"]
        (entry,) = (await client.settle())["models"]
        assert (entry["quantization"], "notes" in entry) == (quantization, False)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
async def test_the_default_model_still_knows_what_it_knew(quantization: str, caplog: pytest.LogCaptureFixture):
    async with running(DEFAULT_MODEL, device="cpu", quantization=quantization) as server, server.client() as client:
        prompt = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
        assert "Paris" in (await client.generate(id="prompt", **prompt))["joined"]
        assert "Paris" in (await client.generate(id="chat", messages=CHAT, temperature=0, max_tokens=24))["joined"]
    # bitsandbytes would tell of every product's inputs.
    assert [record for record in caplog.records if record.name.startswith("bitsandbytes")] == []


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_memory_that_is_told_is_that_of_the_tensors(default_model_folder: Path, quantization: str):
    options = replace(CPU, quantization=quantization)
    before = storages()
    model = load(default_model_folder, options, silent)
    there = sum(size for place, size in storages().items() if place not in before)
    assert model.runner.memory_bytes == pytest.approx(there, rel=0.02)
    assert placement.plan(default_model_folder, options).memory_bytes == pytest.approx(model.runner.memory_bytes, rel=0.1)


def storages() -> dict[int, int]:
    """Give the bytes of every piece of memory that a tensor of this process lies in, by its address."""
    gc.unfreeze()
    gc.collect()
    # By their types: to ask a proxy whose object is gone what it is raises. The compiler's fakes lie nowhere.
    kinds = ((type(thing), thing) for thing in gc.get_objects())
    found = [thing for kind, thing in kinds if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor)]
    tensors = [tensor for tensor in found if not tensor.is_meta]
    packed = {torch.ops.mkldnn.data_ptr(tensor): tensor.nbytes for tensor in tensors if tensor.is_mkldnn}
    stored = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
    return packed | {storage.data_ptr(): storage.nbytes() for storage in stored}


def test_progress_grows_in_each_stage_also_while_weights_are_quantised(root: Path):
    told: list[tuple[str, float]] = []
    load(root / makers.LLAMA, replace(CPU, quantization="nf4"), lambda stage, share: told.append((stage, share)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == ["config", "weights", "quantise", "warmup"]
    for stage in ("weights", "quantise"):
        shares = [share for name, share in told if name == stage]
        assert shares == sorted(shares)
        assert shares[0] < 0.5
        assert 0.9 < shares[-1] <= 1


def test_a_load_that_nobody_waits_for_ends_while_it_quantises(root: Path):
    class GivenUp(Exception):
        pass

    def give_up(stage: str, progress: float) -> None:
        if stage == "quantise":
            raise GivenUp

    with pytest.raises(GivenUp):
        load(root / makers.LLAMA, replace(CPU, quantization="int8"), give_up)


def test_without_bitsandbytes_quantisation_is_refused_and_all_else_is_served(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install bitsandbytes") as refused:
        placement.plan(root / makers.LLAMA, replace(CPU, quantization="nf4"))
    assert (refused.value.reason, refused.value.field) == ("unsupported", "quantization")
    assert placement.plan(root / makers.LLAMA, CPU).options == CPU


def test_what_is_not_quantised_needs_no_bitsandbytes(root: Path):
    script = (
        "import sys; from pathlib import Path; from LLM.loader import load; from LLM._base_model_handler import LoadOptions;"
        "load(Path(sys.argv[1]), LoadOptions(device='cpu', kv_memory=1 << 24), lambda stage, done: None);"
        "sys.exit('bitsandbytes' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(root / makers.LLAMA)], check=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (64, 24), (40, 32), (96, 64)])
def test_layers_of_every_shape_compute_what_their_weights_say(inputs: int, outputs: int, rows: int):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantisation is for those who have bitsandbytes")
    torch.manual_seed(2)
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    model = torch.nn.Sequential(layer).to("cpu").eval()
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    model.dtype = torch.bfloat16  # type: ignore[assignment]  # as transformers' models tell theirs
    settle(model, lambda: None)
    hidden = torch.randn(rows, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = model(hidden).float()
    assert float((found - hidden.float() @ weight.T).norm() / found.norm()) < 2e-2
