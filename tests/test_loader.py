"""Loading model folders, good and bad: tiny random ones, so that every load takes a blink."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from LLM import loader as loader_module
from LLM._base_model_handler import BaseModelHandler, ChatMessage, LoadedModel, LoadOptions
from LLM.engine.compiled_runner import CompiledRunner
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.plain_runner import PlainRunner
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.runner import PagedRunner
from LLM.engine.scheduler import Scheduler
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.loader import load
from LLM.model import Waiter
from LLM.model_service import ModelService
from LLM.model_srv_wsserver_echo import ModelHandler as Echo
from tests.conftest import running

SPECIAL = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
CPU = LoadOptions(device="cpu")
START, END = 258, 259  # after the echo model's 257
SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": START,
    "eos_token_id": END,
    "tie_word_embeddings": True,
}
TOKEN_BYTES = 2 * 2 * 8 * 4  # of the KV cache in float32: keys and values of 8 numbers in 2 layers
BLOCK_BYTES = 16 * TOKEN_BYTES
Break = Callable[[Path], object]


def silent(stage: str, progress: float) -> None:
    """Nobody wants to know."""


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory, default_model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "acme" / "tiny"
    tokenizer = Echo().load(folder, CPU, silent).tokenizer
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    shutil.copy(default_model_folder / "chat_template.jinja", folder)
    save_random_weights(folder, LlamaConfig(**SIZES))
    return folder


def save_random_weights(folder: Path, config: PreTrainedConfig) -> None:
    torch.manual_seed(1)
    # Wider than usual, so that different contexts give clearly different logits.
    config.initializer_range = 0.4
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@pytest.fixture
def folder(good_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_folder, tmp_path / "acme" / "tiny"))


def changed(file: str, **fields: Any) -> Break:
    """Set fields of a JSON file; None takes one out."""

    def change(folder: Path) -> None:
        known = json.loads((folder / file).read_text()) | fields
        (folder / file).write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return change


def without(*files: str) -> Break:
    return lambda folder: [(folder / file).unlink() for file in files]


def holding(file: str, content: str) -> Break:
    return lambda folder: (folder / file).write_text(content)


def cut_to(share: float) -> Break:
    def cut(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])

    return cut


def lacking(tensor: str) -> Break:
    def lack(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[tensor]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return lack


def assert_fit_for_any_client(refused: Refused, folder: Path) -> None:
    assert refused.message
    for word in (str(folder), str(folder.parent), "Traceback", "\n", 'File "', ".py"):
        assert word not in refused.message


# What a good folder gives.


def test_a_loaded_model_tells_its_facts(folder: Path):
    model = load(folder, CPU, silent)
    assert (model.context_length, model.vocabulary_size) == (128, 320)
    assert (model.dtype, model.device) == ("float32", "cpu")
    assert model.end_token_ids == {END}
    assert model.tokenizer.encode("hi<|im_end|>").ids[-1] == END
    assert model.runner.memory_bytes >= (folder / "model.safetensors").stat().st_size - 16384


@pytest.mark.parametrize(
    ("asked", "stored", "has_bfloat16", "given"),
    [
        ("auto", "float32", True, "float32"),
        ("auto", "float16", True, "float32"),
        ("auto", "bfloat16", True, "bfloat16"),
        ("auto", "bfloat16", False, "float32"),
        ("float32", "bfloat16", True, "float32"),
        ("bfloat16", "float32", False, "bfloat16"),
    ],
)
def test_the_dtype_is_the_one_asked_for_and_auto_the_one_that_is_fast_on_this_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str, stored: str, has_bfloat16: bool, given: str
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    model = load(folder, replace(CPU, dtype=asked), silent)
    assert model.dtype == given
    weights = load_file(folder / "model.safetensors")
    numbers, table = sum(t.numel() for t in weights.values()), weights["model.embed_tokens.weight"].numel()
    held = (model.runner.memory_bytes - model.runner.kv_bytes) / getattr(torch, given).itemsize
    # Where a CPU reads weights in an order of its own, the output layer has its own copy of the tied table; and norms, which
    # are large in so small a model alone, have theirs twice.
    assert min(abs(held - numbers), abs(held - numbers - table)) < 0.02 * numbers
    assert greedy(model) == stock_greedy(folder, given)


@pytest.mark.parametrize(
    ("decode", "kind", "notes"),
    [
        ("auto", PagedRunner, []),
        ("eager", PagedRunner, []),
        ("compiled", CompiledRunner, []),
        ("graph", PagedRunner, ["decodes eagerly: graphs need one CUDA device, and Triton"]),
    ],
)
def test_a_cpu_decodes_as_asked_or_says_why_not(folder: Path, decode: str, kind: type[PagedRunner], notes: list[str]):
    model = load(folder, replace(CPU, dtype="float32", decode=decode), silent)
    assert type(model.runner) is kind
    assert model.runner.notes == notes
    assert greedy(model) == stock_greedy(folder, "float32")


@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_the_weights_are_the_folders_in_one_file_or_in_many(folder: Path, shard_size: str):
    stock = AutoModelForCausalLM.from_pretrained(folder)
    without("model.safetensors")(folder)
    stock.save_pretrained(folder, max_shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "15KB")
    assert greedy(load(folder, CPU, silent)) == stock_greedy(folder, "float32")


def greedy(model: LoadedModel) -> list[int]:
    runner = model.runner
    scheduler = Scheduler(1, BlockPool(runner.block_count, runner.block_size), Pacing(runner.max_prefill))
    sequence = scheduler.add(GenerationRequest("k", tuple(range(40, 60)), 10, Sampling(temperature=0)))
    assert sequence
    while sequence.completion_tokens < 10:
        batch = scheduler.next_batch()
        sequence.token_ids += [
            sampled.token_id for sampled in runner.step(batch) if sampled and sampled.token_id is not None
        ]
        scheduler.retire(batch)
    return sequence.completion_ids


def stock_greedy(folder: Path, dtype: str) -> list[int]:
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokens = torch.arange(40, 60)[None]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(tokens)}
    return stock.generate(tokens, **options)[0, 20:].tolist()


@pytest.mark.parametrize(
    ("breaking", "ids"),
    [
        (changed("generation_config.json", eos_token_id=[3, 4]), {3, 4}),
        (changed("generation_config.json", eos_token_id=5), {5, END}),
        (changed("generation_config.json", eos_token_id=None), {END}),
        (without("generation_config.json"), {END}),
    ],
)
def test_the_end_tokens_are_the_generation_configs_and_the_tokenizers(folder: Path, breaking: Break, ids: set[int]):
    breaking(folder)
    assert load(folder, CPU, silent).end_token_ids == ids


def test_sampling_comes_from_generation_config_only_where_it_says_something(folder: Path):
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    plain = load(folder, CPU, silent).generation_config
    assert {name for name in names if plain.get(name) is not None} == set()
    changed("generation_config.json", temperature=0.3, top_k=7, do_sample=True)(folder)
    told = load(folder, CPU, silent).generation_config
    assert {name: told[name] for name in names if told.get(name) is not None} == {"temperature": 0.3, "top_k": 7}


# How much of the machine it gets.


@pytest.mark.parametrize(
    ("memory", "tokens", "context_length"),
    [
        (BLOCK_BYTES, 16, 16),
        (5 * BLOCK_BYTES - 1, 64, 64),
        (8 * BLOCK_BYTES, 128, 128),
        (100 * BLOCK_BYTES, 1600, 128),
    ],
)
def test_the_kv_cache_takes_the_memory_it_may_and_bounds_the_context(
    folder: Path, memory: int, tokens: int, context_length: int
):
    model = load(folder, replace(CPU, kv_memory=memory), silent)
    runner = model.runner
    assert isinstance(runner, PagedRunner)
    assert (runner.block_count * runner.block_size, model.context_length) == (tokens, context_length)
    assert runner.kv_bytes == tokens * TOKEN_BYTES <= memory
    weights = load_file(folder / "model.safetensors")
    least = sum(t.nbytes for t in weights.values())
    most = least + weights["model.embed_tokens.weight"].nbytes + 1024
    assert least <= runner.memory_bytes - runner.kv_bytes <= most, "and the rotary embedding's few numbers"
    assert runner.notes == []


def test_half_the_numbers_size_makes_twice_the_tokens(folder: Path):
    model = load(folder, replace(CPU, kv_memory=4 * BLOCK_BYTES, dtype="bfloat16"), silent)
    assert model.runner.block_count == 8


def test_without_a_word_about_it_the_kv_cache_on_a_cpu_takes_its_default(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader_module, "CPU_KV_MEMORY", 3 * BLOCK_BYTES)
    assert load(folder, CPU, silent).runner.block_count == 3


@pytest.mark.parametrize("memory", [0, BLOCK_BYTES - 1])
def test_too_little_memory_for_the_kv_cache_is_refused_by_name_with_what_it_takes(folder: Path, memory: int):
    with pytest.raises(Refused, match=f"KV cache may have {memory} bytes, but {BLOCK_BYTES} hold 16 tokens") as refused:
        load(folder, replace(CPU, kv_memory=memory), silent)
    assert refused.value.reason == "load_failed"
    assert_fit_for_any_client(refused.value, folder)


@pytest.mark.parametrize(("asked", "cores", "given"), [(None, 4, 3), (None, 1, 1), (3, 2, 3)])
@pytest.mark.parametrize("told_by", ["sched_getaffinity", "cpu_count"])
def test_a_model_gets_the_threads_asked_for_or_all_cores_but_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, told_by: str, asked: int | None, cores: int, given: int
):
    if told_by == "sched_getaffinity":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    else:
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
    load(folder, replace(CPU, threads=asked), silent)
    assert torch.get_num_threads() == given


async def test_a_prompt_with_a_token_that_only_the_tokenizer_knows_is_refused_and_harms_nobody(folder: Path):
    without("model.safetensors", "generation_config.json")(folder)
    save_random_weights(folder, LlamaConfig(**SIZES | {"vocab_size": END, "eos_token_id": START}))
    async with running("acme/tiny", folder.parent.parent, device="cpu") as server, server.client() as client:
        await client.send(type="generate", id="running", prompt="Why?", max_tokens=100, ignore_eos=True)
        await client.until("started")
        error = (await client.generate(id="g", prompt="<|im_end|>", max_tokens=5))["error"]
        assert error["code"] == "bad_message"
        assert str(END) in error["message"]
        assert (await client.done("running"))["finish_reason"] == "length"


# What cannot be paged.


@pytest.fixture
def misfit(folder: Path) -> Path:
    """A model that attends to sinks too, which the paged attention does not know."""
    without("model.safetensors", "generation_config.json")(folder)
    save_random_weights(folder, GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=16))
    return folder


def test_a_model_that_cannot_be_paged_is_served_all_the_same_and_the_log_says_why(
    misfit: Path, caplog: pytest.LogCaptureFixture
):
    model = load(misfit, CPU, silent)
    assert isinstance(model.runner, PlainRunner)
    assert (model.context_length, model.runner.kv_bytes) == (128, 0)
    (note,) = model.runner.notes
    assert "without a paged KV cache" in note
    assert "without a paged KV cache" in caplog.text
    assert greedy(model) == stock_greedy(misfit, "float32")


def test_a_model_that_cannot_be_served_right_is_refused(folder: Path):
    without("model.safetensors")(folder)
    save_random_weights(folder, MambaConfig(**SIZES))
    with pytest.raises(Refused, match="models of this kind cannot be served") as refused:
        load(folder, CPU, silent)
    assert refused.value.reason == "load_failed"
    assert_fit_for_any_client(refused.value, folder)


def test_positions_that_turn_with_the_longest_neighbour_are_served_up_to_where_they_begin_to(folder: Path):
    without("model.safetensors")(folder)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    save_random_weights(
        folder,
        Phi3Config(**SIZES, pad_token_id=0, original_max_position_embeddings=48, rope_parameters=rope),
    )
    assert load(folder, CPU, silent).context_length == 48


async def test_a_client_sees_in_the_status_how_a_model_is_served(misfit: Path):
    async with running("acme/tiny", misfit.parent.parent, device="cpu") as server, server.client() as client:
        done = await client.generate(id="g", prompt="Why?", max_tokens=5, temperature=0, ignore_eos=True)
        assert done["usage"]["completion_tokens"] == 5
        [entry] = (await client.settle())["models"]
        assert ["without a paged KV cache" in note for note in entry["notes"]] == [True]
        assert "kv_cache" not in entry
        assert str(misfit) not in str(entry)


async def test_a_client_sees_in_the_status_how_much_the_kv_cache_holds(folder: Path):
    settings = {"device": "cpu", "kv_memory": 4 * BLOCK_BYTES}
    async with running("acme/tiny", folder.parent.parent, "float32", **settings) as server, server.client() as client:
        done = await client.generate(id="long", prompt="x" * 40, max_tokens=30)
        assert done["error"]["code"] == "context_length_exceeded"
        assert "64 tokens" in done["error"]["message"]
        done = await client.generate(id="fits", prompt="x" * 40, max_tokens=24, ignore_eos=True)
        assert done["usage"]["completion_tokens"] == 24
        [entry] = (await client.settle())["models"]
        assert entry["context_length"] == 64
        assert entry["kv_cache"] == {"tokens": 64, "bytes": 4 * BLOCK_BYTES}
        assert entry["memory_bytes"] > 4 * BLOCK_BYTES
        assert "notes" not in entry


# Progress.


@pytest.mark.parametrize("threads", ["one", "many"])
@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_progress_grows_in_each_stage_and_the_weights_come_to_their_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str, threads: str
):
    if threads == "many":
        monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size=shard_size)
    if shard_size == "15KB":
        without("model.safetensors")(folder)
    told: list[tuple[str, float]] = []
    load(folder, LoadOptions(), lambda stage, progress: told.append((stage, progress)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == ["config", "weights", "warmup"]
    weights = [progress for stage, progress in told if stage == "weights"]
    assert weights == sorted(weights)
    assert len(set(weights)) > 5
    assert all(0 <= progress <= 1 for _, progress in told)
    assert weights[-1] == 1


@pytest.mark.parametrize("threads", ["one", "many"])
@pytest.mark.parametrize("stage", ["config", "weights", "warmup"])
def test_what_progress_raises_ends_the_load_in_every_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, threads: str
):
    if threads == "many":
        monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)

    class GivenUp(Exception):
        pass

    def give_up(at: str, progress: float) -> None:
        if at == stage:
            raise GivenUp

    with pytest.raises(GivenUp):
        load(folder, LoadOptions(), give_up)


# What is refused.


def test_a_device_this_machine_does_not_have_is_unsupported(folder: Path):
    with pytest.raises(Refused) as refused:
        load(folder, LoadOptions(device="cuda:99"), silent)
    assert (refused.value.reason, refused.value.field) == ("unsupported", "device")
    assert_fit_for_any_client(refused.value, folder)


BROKEN: dict[str, Break] = {
    "no weights": without("model.safetensors"),
    "weights cut in half": cut_to(0.5),
    "weights cut in the header": cut_to(0.001),
    "weights without their last byte": cut_to(0.99999),
    "empty weights": cut_to(0),
    "a tensor missing": lacking("model.layers.1.mlp.up_proj.weight"),
    "a layer missing": changed("config.json", num_hidden_layers=3),
    "an output layer missing": changed("config.json", tie_word_embeddings=False),
    "no tokenizer": without("tokenizer.json", "tokenizer_config.json"),
    "no tokenizer.json": without("tokenizer.json"),
    "half a tokenizer": holding("tokenizer.json", '{"version": "1.0", "model'),
    "an empty tokenizer": holding("tokenizer.json", "{}"),
    "no config": without("config.json"),
    "half a config": holding("config.json", '{"model_type": "lla'),
    "a config that is a list": holding("config.json", "[]"),
    "no architecture": changed("config.json", model_type=None, architectures=None),
    "an unknown architecture": changed("config.json", model_type="zork"),
    "an architecture that writes no text": changed("config.json", model_type="vit"),
    "half a generation config": holding("generation_config.json", "{"),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
def test_a_folder_that_cannot_be_loaded_is_refused(folder: Path, breaking: Break):
    breaking(folder)
    with pytest.raises(Refused) as refused:
        load(folder, CPU, silent)
    assert refused.value.reason == "load_failed"
    assert_fit_for_any_client(refused.value, folder)


def test_the_same_weights_in_another_layout_are_left_alone(folder: Path):
    (folder / "consolidated.safetensors").write_bytes(b"of another loader's")
    assert greedy(load(folder, CPU, silent)) == stock_greedy(folder, load(folder, CPU, silent).dtype)


@pytest.mark.parametrize(
    ("what", "advice"),
    [
        ("an unknown architecture", "newer transformers"),
        ("an architecture that writes no text", "newer transformers"),
        ("no tokenizer", "tokenizer.json"),
        ("an empty tokenizer", "tokenizer.json"),
        ("weights without their last byte", "ends too early; copy it anew"),
    ],
)
def test_a_refusal_says_what_to_do(folder: Path, what: str, advice: str):
    BROKEN[what](folder)
    with pytest.raises(Refused, match=advice):
        load(folder, CPU, silent)


def test_a_device_without_memory_for_the_model_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has ...")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(Refused, match=r"not enough memory .* smaller dtype") as refused:
        load(folder, CPU, silent)
    assert refused.value.reason == "load_failed"
    assert_fit_for_any_client(refused.value, folder)


TWISTED: dict[str, Break] = {
    "weights of another size": changed("config.json", hidden_size=32),
    "heads that are a word": changed("config.json", num_attention_heads="many"),
    "no heads": changed("config.json", num_attention_heads=0),
    "a quantised one": changed("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "weights cut in half": cut_to(0.5),
}


@pytest.mark.parametrize("breaking", TWISTED.values(), ids=TWISTED)
async def test_whatever_is_wrong_with_a_folder_a_client_is_told_that_the_load_failed(folder: Path, breaking: Break):
    breaking(folder)
    models = ModelService("acme/tiny", CPU, EngineSettings(1), folder.parent.parent)
    with pytest.raises(Refused) as refused:
        await models.get(models.resolve(), Waiter())
    assert refused.value.reason == "load_failed"
    assert_fit_for_any_client(refused.value, folder)
    assert models.status() == []
    await models.close()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_opened(folder: Path, tmp_path: Path):
    without("model.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(Refused, match="safetensors") as refused:
        load(folder, CPU, silent)
    assert refused.value.reason == "load_failed"
    assert not (tmp_path / "sprung").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap itself is broken"


@pytest.mark.parametrize("model_type", ["llama", "zork"])
def test_code_that_comes_with_a_model_is_never_run(folder: Path, tmp_path: Path, model_type: str):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Config", None]}
    changed("config.json", model_type=model_type, auto_map=code)(folder)
    changed("tokenizer_config.json", auto_map=code)(folder)
    loaded = None
    with contextlib.suppress(Refused):
        loaded = load(folder, CPU, silent)
    assert loaded is None or greedy(loaded) == stock_greedy(folder, "float32")
    assert not (tmp_path / "sprung").exists()


# Chat templates.


def text_of(model: LoadedModel, *messages: tuple[str, str]) -> str:
    conversation = [ChatMessage(role=role, content=content) for role, content in messages]  # type: ignore[typeddict-item]
    ids = BaseModelHandler().encode_chat(model, conversation)
    return model.tokenizer.decode(ids, skip_special_tokens=False)


CONVERSATIONS = {
    "a question": [("user", "Why?")],
    "a system's words": [("system", "Be brief."), ("user", "Why?")],
    "turns": [("user", "Why?"), ("assistant", "Because."), ("user", "And\n\nthen?  ")],
    "any characters": [("user", "žluťoučký 😀 {{ 7 * 7 }} {% raw %} <|im_end|>")],
    "nothing": [("user", "")],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_conversation_is_written_by_the_folders_own_template(good_folder: Path, messages: list[tuple[str, str]]):
    told = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    if messages[0][0] != "system":
        told = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n" + told
    assert text_of(load(good_folder, CPU, silent), *messages) == told + "<|im_start|>assistant\n"


@pytest.mark.parametrize("begun", ["Because", "  Because of ", "Well,\n", "", "user"])
def test_a_final_message_of_the_assistants_is_continued(good_folder: Path, begun: str):
    text = text_of(load(good_folder, CPU, silent), ("user", "Why?"), ("assistant", begun))
    assert text.endswith("<|im_start|>assistant\n" + begun)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% for %}", "{{ messages[7].content.no }}"],
)
def test_a_conversation_that_the_template_refuses_is_a_bad_message(folder: Path, template: str):
    holding("chat_template.jinja", template)(folder)
    with pytest.raises(Refused, match="chat template refuses") as refused:
        text_of(load(folder, CPU, silent), ("user", "Why?"))
    assert (refused.value.reason, refused.value.field) == ("bad_message", "messages")
    assert_fit_for_any_client(refused.value, folder)


def test_a_final_message_that_the_template_does_not_write_cannot_be_continued(folder: Path):
    holding("chat_template.jinja", "{{ messages[0]['content'] }}")(folder)
    with pytest.raises(Refused, match="end with a user's") as refused:
        text_of(load(folder, CPU, silent), ("user", "Why?"), ("assistant", "Because"))
    assert (refused.value.reason, refused.value.field) == ("bad_message", "messages")
    assert_fit_for_any_client(refused.value, folder)


def test_the_templates_own_words_reach_the_client(folder: Path):
    holding("chat_template.jinja", "{{ raise_exception('roles must alternate') }}")(folder)
    with pytest.raises(Refused, match="roles must alternate"):
        text_of(load(folder, CPU, silent), ("user", "Why?"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ (messages|attr('__class__')).__name__ }}",
        "{{ messages['__class__'].mro() }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ raise_exception.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ '{0.__class__.__mro__}'.format(messages).no.no }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_reach_python(folder: Path, template: str):
    holding("chat_template.jinja", template)(folder)
    with pytest.raises(Refused) as refused:
        text_of(load(folder, CPU, silent), ("user", "Why?"))
    assert refused.value.reason == "bad_message"
    assert_fit_for_any_client(refused.value, folder)


def test_a_template_that_takes_all_time_is_noted_at_the_load_and_prompts_are_served(folder: Path):
    holding("chat_template.jinja", "{{ 9**(9**9) }}")(folder)
    model = load(folder, replace(CPU, template_timeout=0.5), silent)
    (note,) = [note for note in model.runner.notes if "takes no messages" in note]
    assert "longer than 0.5 s" in note
    with pytest.raises(Refused, match="took longer") as refused:
        text_of(model, ("user", "Why?"))
    assert (refused.value.reason, refused.value.field) == ("unsupported", "messages")
    assert_fit_for_any_client(refused.value, folder)
    assert BaseModelHandler().encode_prompt(model, "Why?")


def test_a_folder_without_a_template_serves_prompts_only(folder: Path):
    without("chat_template.jinja")(folder)
    model = load(folder, CPU, silent)
    with pytest.raises(Refused, match="no chat template") as refused:
        text_of(model, ("user", "Why?"))
    assert refused.value.reason == "unsupported"
    assert BaseModelHandler().encode_prompt(model, "Why?")
