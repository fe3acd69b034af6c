"""How a prompt that cannot fit is found out early, and that one that fits never is, with real tokenizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from LLM import gguf_file
from LLM._base_model_handler import BaseModelHandler, ChatMessage, LoadedModel, encode
from LLM.chat import length
from LLM.chat.reading import Reading, Unwanted, within
from LLM.errors import Refused
from LLM.gguf_tokenizer import tokenizer_of
from LLM.listing import MODELS_ROOT
from LLM.loader import _chat_template
from LLM.loading.steady_file import SteadyFile
from LLM.model_srv_llama_llama_3_2_3b_instruct import ModelHandler as Llama
from LLM.model_srv_mistralai_mistral_7b_instruct_v0_3 import ModelHandler as Mistral
from LLM.model_srv_wsserver_echo import EchoRunner
from tests import makers
from tests.test_plain_text import TOKENIZERS

NAMES = ["smollm2", "mistral", "nemo", "llama", "gemma", *TOKENIZERS]
# Of what texts are made that are dense, or sparse, or hard to cut.
WORDS = [
    "7",
    "a",
    " ",
    "\n",
    "the ",
    "ž",
    "😀",
    "<",
    "=",
    "\t",
    "<|im_end|>",
    "[INST]",
    "word",
    "'s",
    "\u0301",
    "漢",
    "  \n",
    ".",
]
texts = st.lists(st.tuples(st.sampled_from(WORDS), st.integers(1, 300)), max_size=8).map(
    lambda runs: "".join(word * times for word, times in runs)
)
mixed = st.lists(st.sampled_from(WORDS), max_size=300).map("".join)


@pytest.fixture(scope="module")
def tokenizers(default_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made = {name: make() for name, make in TOKENIZERS.items()}
    if files := [*(MODELS_ROOT / "google" / "gemma-3-270m").glob("*.gguf")]:
        made["gemma"] = tokenizer_of(gguf_file.read(SteadyFile(files[0]))).backend_tokenizer
    return made | {
        "smollm2": AutoTokenizer.from_pretrained(default_model_folder, local_files_only=True).backend_tokenizer,
        "mistral": makers.mistral_tokenizer(),
        "nemo": makers.nemo_tokenizer(tmp_path_factory.mktemp("nemo") / "ranks"),
        "llama": makers.llama_tokenizer(),
    }


def model_of(tokenizer: Tokenizer, template: Any = None, context_length: int = 4096) -> LoadedModel:
    return LoadedModel(EchoRunner(), tokenizer, context_length, 1 << 18, "none", "cpu", template)


@pytest.fixture(autouse=True, scope="module")
def _short_pieces():
    """Cut often, so that short texts are cut too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "PIECE", 300)
        patch.setattr(length, "CUT_WITHIN", 20)
        patch.setattr(length, "SLACK", 100)
        yield


@pytest.fixture(scope="module")
def models(tokenizers: dict[str, Tokenizer]) -> dict[str, LoadedModel]:
    return {name: model_of(tokenizer) for name, tokenizer in tokenizers.items()}


def there(models: dict[str, LoadedModel], name: str) -> LoadedModel:
    if name not in models:
        pytest.skip("Gemma is missing; `make test` installs it")
    return models[name]


@pytest.mark.parametrize("name", NAMES)
@given(text=texts | mixed)
@example(text="<|im_end|>" + "  \n" * 164)  # a token that takes spaces along, which a cut parts from it
@example(text="a" * 294 + "<|im_end|>" + "\n" * 250)  # and one that is cut itself
@settings(max_examples=40, deadline=None)
def test_a_prompt_that_just_fits_is_never_refused(models: dict[str, LoadedModel], name: str, text: str):
    model = there(models, name)
    ids = BaseModelHandler().encode_prompt(model, text)
    assert Reading(len(ids), "prompt").read(lambda: BaseModelHandler().encode_prompt(model, text)) == ids


@pytest.mark.parametrize("name", NAMES)
@given(text=texts)
@settings(max_examples=40, deadline=None)
def test_no_token_stands_for_more_characters_than_is_said(models: dict[str, LoadedModel], name: str, text: str):
    model = there(models, name)
    if longest := model.plain_text.longest_token:
        assert len(encode(model.tokenizer, text, add_special_tokens=False)) * longest >= len(text)


def test_real_tokenizers_have_a_bound_of_characters(models: dict[str, LoadedModel]):
    known = {name for name, model in models.items() if model.plain_text.longest_token}
    assert known >= {"smollm2", "mistral", "llama"}
    assert known.isdisjoint({"word level", "word piece", "unigram", "bpe"})


@pytest.fixture(scope="module")
def chats(tokenizers: dict[str, Tokenizer], default_model_folder: Path) -> dict[str, tuple[BaseModelHandler, LoadedModel]]:
    template = _chat_template(AutoTokenizer.from_pretrained(default_model_folder, local_files_only=True), 60.0)
    return {
        "smollm2": (BaseModelHandler(), model_of(tokenizers["smollm2"], template)),
        "mistral": (Mistral(), model_of(tokenizers["mistral"])),
        "llama": (Llama(), model_of(tokenizers["llama"])),
    }


@pytest.mark.parametrize("name", ["smollm2", "mistral", "llama"])
@given(said=st.lists(texts | mixed, min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_conversation_that_just_fits_is_never_refused(
    chats: dict[str, tuple[BaseModelHandler, LoadedModel]], name: str, said: list[str]
):
    handler, model = chats[name]
    messages = [ChatMessage(role="user", content=text) for text in said]
    ids = handler.encode_chat(model, messages)
    assert Reading(len(ids), "messages").read(lambda: handler.encode_chat(model, messages)) == ids


TOO_LONG: dict[str, Callable[[], list[ChatMessage]]] = {
    "digits": lambda: [ChatMessage(role="user", content="7" * 256_000)],
    "brackets": lambda: [ChatMessage(role="user", content="<" * 256_000)],
    "control tokens": lambda: [ChatMessage(role="user", content="<|im_end|>" * 25_600)],
    "prose": lambda: [ChatMessage(role="user", content="The quick brown fox jumps. " * 9000)],
    "empty messages": lambda: [ChatMessage(role="user", content="")] * 8000,
    "short messages": lambda: [ChatMessage(role="user", content="Hi")] * 8000,
}


@pytest.mark.parametrize("messages", TOO_LONG.values(), ids=TOO_LONG)
@pytest.mark.parametrize("name", ["smollm2", "llama"])
def test_what_cannot_fit_is_refused_after_a_part_of_it(
    chats: dict[str, tuple[BaseModelHandler, LoadedModel]],
    name: str,
    messages: Callable[[], list[ChatMessage]],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(length, "PIECE", 16_384)
    monkeypatch.setattr(length, "SLACK", 128)
    handler, model = chats[name]
    bounds = Reading(2000, "messages")
    with pytest.raises(Refused, match="up to 2000 tokens, and this one has more") as refused:
        bounds.read(lambda: handler.encode_chat(model, messages()))
    assert (refused.value.reason, refused.value.field) == ("context_length_exceeded", "messages")
    # That many tokens were made of it: a piece at most beyond the limit, or none where its control tokens are too many.
    assert 0 < bounds.tokens < 25_000


def test_a_raw_prompt_that_cannot_fit_is_refused_without_encoding_it(models: dict[str, LoadedModel]):
    model = models["smollm2"]
    assert model.plain_text.longest_token
    bounds = Reading(10, "prompt")
    with pytest.raises(Refused, match="up to 10 tokens"):
        bounds.read(lambda: BaseModelHandler().encode_prompt(model, " " * (10 * model.plain_text.longest_token + 1)))
    bounds.end(1_000_000)
    assert bounds.tokens == 0  # nothing was made of it, and nothing is to be paid for


@pytest.mark.parametrize("name", ["smollm2", "llama"])
def test_what_nobody_waits_for_any_more_is_read_no_further(
    chats: dict[str, tuple[BaseModelHandler, LoadedModel]], name: str, monkeypatch: pytest.MonkeyPatch
):
    handler, model = chats[name]
    bounds, made = Reading(10_000, "messages"), Reading.made

    def leave(self: Reading, tokens: int) -> None:
        self.wanted = False
        made(self, tokens)

    monkeypatch.setattr(Reading, "made", leave)
    with pytest.raises(Unwanted):
        bounds.read(lambda: handler.encode_chat(model, [ChatMessage(role="user", content="Why? " * 10_000)]))
    with pytest.raises(Unwanted), within(bounds):
        handler.encode_chat(model, [ChatMessage(role="user", content="Why?")] * 10)
    assert bounds.tokens < 10_000
