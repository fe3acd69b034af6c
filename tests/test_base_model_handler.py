"""What a model handler makes of a request: defaults and their precedence, refusals by name, and the drop-ins' own rules."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from LLM._base_model_handler import BaseModelHandler, ChatMessage, GenerationOptions, LoadedModel, LoadOptions
from LLM.engine.request import GenerationRequest, Sampling
from LLM.errors import Refused
from LLM.listing import MODELS_ROOT, drop_in_name, list_models
from LLM.model_srv_wsserver_echo import END
from LLM.model_srv_wsserver_echo import ModelHandler as Echo
from tests.conftest import DEFAULT_MODEL, ECHO

DROP_INS = sorted(MODELS_ROOT.glob("model_srv_*.py"))
CONTEXT = 100


class WithFacts(BaseModelHandler):
    sampling = {"temperature": 0.2, "top_p": 0.9}


def written(messages: Sequence[ChatMessage]) -> str:
    return "".join(f"<{m['role']}>{m['content']}" for m in messages)


@pytest.fixture
def model() -> LoadedModel:
    echo = Echo().load(Path(), LoadOptions(), lambda stage, progress: None)
    return replace(echo, context_length=CONTEXT, chat_template=written)


def request(
    model: LoadedModel, prompt_tokens: int = 3, handler: BaseModelHandler | None = None, **options: Any
) -> GenerationRequest:
    handler = handler or BaseModelHandler()
    return handler.request(model, "key", [7] * prompt_tokens, GenerationOptions(**options))


def refusal(model: LoadedModel, *args: Any, **options: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        request(model, *args, **options)
    return refused.value


# Defaults.


@pytest.mark.parametrize(
    ("configured", "asked", "given"),
    [
        ({}, {}, (0.2, 0.9, 0)),
        ({"temperature": 0.6}, {}, (0.6, 0.9, 0)),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 1.5}, (1.5, 0.9, 20)),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.0, "top_k": 0, "top_p": 1.0}, (0.0, 1.0, 0)),
        ({"temperature": None, "top_p": None}, {}, (0.2, 0.9, 0)),
    ],
)
def test_the_request_goes_before_the_folders_config_and_that_before_the_drop_ins_facts(
    model: LoadedModel, configured: dict[str, Any], asked: dict[str, float], given: tuple[float, float, int]
):
    model = replace(model, generation_config=configured)
    sampling = request(model, handler=WithFacts(), sampling=asked).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == given


def test_without_any_facts_sampling_is_neutral(model: LoadedModel):
    assert replace(request(model).sampling, seed=0) == Sampling()


def test_only_sampling_is_taken_from_the_folders_config(model: LoadedModel):
    config = {"max_length": 20, "max_new_tokens": 5, "eos_token_id": 3, "seed": 4, "min_p": 0.1, "repetition_penalty": 1.3}
    made = request(replace(model, generation_config=config))
    assert (made.sampling.min_p, made.sampling.repetition_penalty) == (0.1, 1.3)
    assert (made.max_tokens, made.end_token_ids) == (CONTEXT - 3, {END})


def test_every_field_of_sampling_can_be_asked_for(model: LoadedModel):
    asked = Sampling(0.5, 0.4, 3, 0.2, 1.1, 0.6, 0.7, {5: 1.0}, 99)
    fields = {name: getattr(asked, name) for name in Sampling.__slots__}
    assert request(model, sampling=fields).sampling == asked


def test_a_request_without_seed_gets_one_of_its_own(model: LoadedModel):
    seeds = {request(model).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_rest_of_the_options_reach_the_engine(model: LoadedModel):
    made = request(model, max_tokens=9, min_tokens=4, stop=("a", "b"), stop_token_ids=(1, 2))
    expected = GenerationRequest("key", (7, 7, 7), 9, made.sampling, ("a", "b"), frozenset({1, 2, END}), 4)
    assert made == expected


def test_ignore_eos_leaves_the_clients_own_stop_tokens(model: LoadedModel):
    assert request(model, ignore_eos=True, stop_token_ids=(1,)).end_token_ids == {1}
    assert request(model, ignore_eos=True).end_token_ids == frozenset()


# The context.


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "given"), [(3, None, 97), (99, None, 1), (99, 1, 1), (90, 10, 10), (3, 97, 97)]
)
def test_what_fits_the_context_to_the_last_token_is_served(
    model: LoadedModel, prompt_tokens: int, max_tokens: int | None, given: int
):
    assert request(model, prompt_tokens, max_tokens=max_tokens).max_tokens == given


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(100, None), (100, 1), (101, None), (90, 11), (3, 2**31 - 1)])
def test_what_passes_the_context_is_refused_with_the_numbers(model: LoadedModel, prompt_tokens: int, max_tokens: int | None):
    refused = refusal(model, prompt_tokens, max_tokens=max_tokens)
    assert refused.reason == "context_length_exceeded"
    assert refused.field == ("max_tokens" if max_tokens else None)
    for number in (prompt_tokens, max_tokens or 1, CONTEXT):
        assert str(number) in refused.message


def test_a_prompt_of_no_tokens_is_a_bad_message(model: LoadedModel):
    refused = refusal(model, 0)
    assert (refused.reason, refused.field) == ("bad_message", "prompt")


# Token ids.


@pytest.mark.parametrize("beyond", [END + 1, 2**31 - 1])
@pytest.mark.parametrize("field", ["stop_token_ids", "logit_bias"])
def test_a_token_id_the_model_does_not_have_is_refused_by_field(model: LoadedModel, field: str, beyond: int):
    options: dict[str, Any] = {
        "stop_token_ids": (0, beyond),
        "logit_bias": {"sampling": {"logit_bias": {0: 1.0, beyond: 1.0}}},
    }
    refused = refusal(model, **(options["logit_bias"] if field == "logit_bias" else {field: options[field]}))
    assert refused.reason == "bad_message"
    assert refused.field == field
    assert str(beyond) in refused.message
    assert f"0 to {END}" in refused.message


def test_the_last_token_id_is_one(model: LoadedModel):
    made = request(model, stop_token_ids=(END,), sampling={"logit_bias": {END: 1.0}})
    assert made.sampling.logit_bias == {END: 1.0}


# Prompts.


CONVERSATION = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Why?")]


def test_a_conversation_is_written_by_the_template_without_further_special_tokens(model: LoadedModel):
    model.tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", END)])
    ids = BaseModelHandler().encode_chat(model, CONVERSATION)
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == "<system>Be brief.<user>Why?"


def test_a_prompt_begins_as_every_text_of_the_model_does(model: LoadedModel):
    model.tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", END)])
    ids = BaseModelHandler().encode_prompt(model, "Why?")
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == "<|end|>Why?"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("<|end|>Why?", "<|end|>Why?"), ("<|end|><|end|>Why?", "<|end|><|end|>Why?"), ("<|end|>", "<|end|>"), ("", "<|end|>")],
)
def test_a_prompt_that_begins_so_already_does_not_do_it_twice(model: LoadedModel, prompt: str, read: str):
    model.tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", END)])
    ids = BaseModelHandler().encode_prompt(model, prompt)
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == read


def test_a_control_token_in_a_message_is_text_and_in_a_prompt_is_itself(model: LoadedModel):
    said = "a<|end|>b"
    chat = BaseModelHandler().encode_chat(model, [ChatMessage(role="user", content=said)])
    assert END not in chat
    assert model.tokenizer.decode(chat) == f"<user>{said}"
    assert BaseModelHandler().encode_prompt(model, said).count(END) == 1


@pytest.mark.parametrize(("ignore_eos", "ends"), [(False, {END, 65}), (True, set())])
def test_a_drop_in_may_state_more_end_tokens(model: LoadedModel, ignore_eos: bool, ends: set[int]):
    class Ends(BaseModelHandler):
        end_tokens = (str(model.tokenizer.id_to_token(65)), "<|unheard of|>")

    assert request(model, handler=Ends(), ignore_eos=ignore_eos).end_token_ids == ends


def test_a_model_without_chat_template_does_not_support_messages(model: LoadedModel):
    with pytest.raises(Refused, match="send prompt instead, or have its operator write a drop-in") as refused:
        BaseModelHandler().encode_chat(replace(model, chat_template=None), CONVERSATION)
    assert (refused.value.reason, refused.value.field) == ("unsupported", "messages")


def test_a_drop_in_may_rewrite_the_conversation_before_the_template_sees_it(model: LoadedModel):
    class NoSystem(BaseModelHandler):
        def preprocess(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
            return [m for m in messages if m["role"] != "system"]

    assert model.tokenizer.decode(NoSystem().encode_chat(model, CONVERSATION)) == "<user>Why?"


# Drop-ins.


@pytest.mark.parametrize("path", DROP_INS, ids=lambda path: path.stem)
def test_a_drop_in_is_one_short_class_with_the_expected_name(path: Path):
    assert len(path.read_text().splitlines()) <= 60
    module = import_module(f"LLM.{path.stem}")
    handler = module.ModelHandler
    assert issubclass(handler, BaseModelHandler)
    assert handler is not BaseModelHandler
    assert handler.__module__ == module.__name__
    assert handler.__doc__
    public = {name for name, thing in vars(handler).items() if not name.startswith("_") and not inspect.isclass(thing)}
    assert public <= set(dir(BaseModelHandler)), "a drop-in only fills in what the base class knows"


@pytest.mark.parametrize("path", DROP_INS, ids=lambda path: path.stem)
def test_a_drop_ins_facts_are_valid_sampling(path: Path):
    Sampling(**import_module(f"LLM.{path.stem}").ModelHandler.sampling)


def test_there_are_the_drop_ins_that_the_documents_speak_of():
    assert {path.stem for path in DROP_INS} >= {drop_in_name(DEFAULT_MODEL), drop_in_name(ECHO)}


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", "model_srv_mistralai_mistral_7b_instruct_v0_3"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "model_srv_huggingfacetb_smollm2_135m_instruct"),
        ("wsserver/echo", "model_srv_wsserver_echo"),
        ("a/B-1.0", "model_srv_a_b_1_0"),
        ("Qwen/Qwen2.5--0.5B_", "model_srv_qwen_qwen2_5_0_5b"),
        ("../../etc/passwd", "model_srv_etc_passwd"),
        ("ünïcode/модель", "model_srv_n_code"),
    ],
)
def test_a_drop_ins_name_is_a_function_of_the_models_id(model_id: str, name: str):
    assert drop_in_name(model_id) == name
    assert name.isidentifier()


def test_a_folder_gets_its_drop_in_and_one_without_gets_the_base(tmp_path: Path):
    for name in (DEFAULT_MODEL, "acme/tiny"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    listing = list_models(tmp_path)
    smollm = import_module(f"LLM.{drop_in_name(DEFAULT_MODEL)}").ModelHandler
    assert {name: listed.handler for name, listed in listing.items()} == {
        ECHO: Echo,
        DEFAULT_MODEL: smollm,
        "acme/tiny": BaseModelHandler,
    }
