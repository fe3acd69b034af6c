"""Loading model folders, good and bad: tiny random ones, so that every load takes a blink."""

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from LLM._base_model_handler import BaseModelHandler, ChatMessage, LoadedModel, LoadOptions
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.scheduler import Scheduler
from LLM.errors import Refused
from LLM.loader import load
from LLM.model import Waiter
from LLM.model_service import ModelService
from LLM.model_srv_wsserver_echo import ModelHandler as Echo

SPECIAL = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
CPU = LoadOptions(device="cpu")
START, END = 258, 259  # after the echo model's 257
Break = Callable[[Path], object]


def silent(stage: str, progress: float) -> None:
    """Nobody wants to know."""


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory, default_model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "acme" / "tiny"
    tokenizer = Echo().load(folder, CPU, silent).tokenizer
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    shutil.copy(default_model_folder / "chat_template.jinja", folder)
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    config = LlamaConfig(**sizes, bos_token_id=START, eos_token_id=END, tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("asked", "given"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_dtype_is_the_one_asked_for_and_auto_is_float32_on_a_cpu(folder: Path, stored: str, asked: str, given: str):
    AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    model = load(folder, replace(CPU, dtype=asked), silent)
    assert model.dtype == given
    assert greedy(model) == stock_greedy(folder, given)


@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_the_weights_are_the_folders_in_one_file_or_in_many(folder: Path, shard_size: str):
    stock = AutoModelForCausalLM.from_pretrained(folder)
    without("model.safetensors")(folder)
    stock.save_pretrained(folder, max_shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "15KB")
    assert greedy(load(folder, CPU, silent)) == stock_greedy(folder, "float32")


def greedy(model: LoadedModel) -> list[int]:
    scheduler = Scheduler(1)
    sequence = scheduler.add(GenerationRequest("k", tuple(range(40, 60)), 10, Sampling(temperature=0)))
    assert sequence
    while sequence.completion_tokens < 10:
        sequence.token_ids += [token_id for token_id in model.runner.step(scheduler.next_batch()) if token_id is not None]
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


# Progress.


@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_progress_grows_in_each_stage_and_the_weights_come_to_their_end(folder: Path, shard_size: str):
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


@pytest.mark.parametrize("stage", ["config", "weights", "warmup"])
def test_what_progress_raises_ends_the_load_in_every_stage(folder: Path, stage: str):
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
    models = ModelService("acme/tiny", CPU, 1, folder.parent.parent)
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


def test_the_templates_own_words_reach_the_client(folder: Path):
    holding("chat_template.jinja", "{{ raise_exception('roles must alternate') }}")(folder)
    with pytest.raises(Refused, match="roles must alternate"):
        text_of(load(folder, CPU, silent), ("user", "Why?"))


def test_a_template_cannot_reach_python(folder: Path):
    holding("chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}")(folder)
    with pytest.raises(Refused) as refused:
        text_of(load(folder, CPU, silent), ("user", "Why?"))
    assert refused.value.reason == "bad_message"


def test_a_folder_without_a_template_serves_prompts_only(folder: Path):
    without("chat_template.jinja")(folder)
    model = load(folder, CPU, silent)
    with pytest.raises(Refused, match="no chat template") as refused:
        text_of(model, ("user", "Why?"))
    assert refused.value.reason == "unsupported"
    assert BaseModelHandler().encode_prompt(model, "Why?")
