"""Conversations have exactly the token ids that the makers' own packages give them, and stream over a socket."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from LLM._base_model_handler import BaseModelHandler, ChatMessage, GenerationOptions, LoadedModel
from LLM.errors import Refused
from LLM.listing import list_models
from LLM.loader import _chat_template
from LLM.model_srv_llama_llama_3_2_3b_instruct import ModelHandler as Llama
from LLM.model_srv_mistralai_mistral_7b_instruct_v0_3 import ModelHandler as Mistral
from LLM.model_srv_mistralai_mistral_nemo_instruct_2407 import ModelHandler as Nemo
from LLM.model_srv_wsserver_echo import EchoRunner
from tests import makers
from tests.conftest import Running, running

SPECIAL = ("<s>", "</s>", "[INST]", "[/INST]", "<unk>", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<0x0A>")
ODD = (
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\x00",
    "\u00a0",
    "\u3000",
    "\u200b",
    "▁",
    "e\u0301",
    "👩‍👩‍👧",
    "ſ",
    "٣",
    "'S",
    "<",
    "]",
)
WORDS = ("Why", " is", " it", "don't", "123456", "日本語", "žluť", "def f(x):", "...")
contents = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(SPECIAL + ODD + WORDS), max_size=10).map("".join))


def says(role: Any, content: str) -> ChatMessage:
    return ChatMessage(role=role, content=content)


conversations = st.lists(st.builds(says, st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=6)
LISTED = {
    "a question": [says("user", "Why?")],
    "a system's words first": [says("system", "Be brief."), says("user", "Why?")],
    "in the middle": [says("user", "Hi"), says("system", "Be brief."), says("user", "Why?")],
    "last": [says("user", "Hi"), says("system", "Be brief.")],
    "alone": [says("system", "Be brief.")],
    "several": [says("system", "Be brief."), says("system", ""), says("system", " Be kind."), says("user", "Why?")],
    "turns": [says("user", "Hi"), says("assistant", "Yes? "), says("user", "Why?")],
    "an answer to be continued": [says("user", "Hi"), says("assistant", " Well, ")],
    "two answers in a row": [says("user", "Hi"), says("assistant", "Well"), says("assistant", "so ")],
    "an answer first": [says("assistant", "Hi"), says("user", "Why?")],
    "nothing": [says("user", "")],
    "spaces": [says("user", "  Why? \n"), says("assistant", "\n Because  "), says("user", " ")],
    "control tokens": [says("user", "</s>[INST] <s><|eot_id|>[/INST]"), says("assistant", "<s>"), says("user", "[INST]")],
}


@dataclass(frozen=True)
class Family:
    """A family: its drop-in, and how its maker encodes."""

    handler: BaseModelHandler
    ids: Callable[[Sequence[ChatMessage]], list[int]]
    model: LoadedModel

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self.handler.encode_chat(self.model, messages)


def served(tokenizer: Tokenizer) -> LoadedModel:
    return LoadedModel(EchoRunner(), tokenizer, 4096, 1 << 17, "none", "cpu")


@pytest.fixture(scope="module")
def mistral() -> Family:
    return Family(Mistral(), makers.mistral_ids, served(makers.mistral_tokenizer()))


@pytest.fixture(scope="module")
def llama() -> Family:
    return Family(Llama(), makers.llama_ids, served(makers.llama_tokenizer()))


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(Nemo(), makers.nemo_ids, served(makers.nemo_tokenizer(tmp_path_factory.mktemp("nemo") / "ranks")))


# The makers' ids.


@given(messages=conversations)
@settings(max_examples=100, deadline=None)
def test_a_conversation_with_llama_has_metas_ids(llama: Family, messages: list[ChatMessage]):
    assert llama.encode(messages) == llama.ids(messages)


@pytest.mark.parametrize("family", ["mistral", "nemo"])
@given(messages=conversations)
@settings(max_examples=100, deadline=None)
def test_a_conversation_with_mistral_has_mistrals_ids_or_neither_takes_it(
    request: pytest.FixtureRequest, family: str, messages: list[ChatMessage]
):
    of: Family = request.getfixturevalue(family)
    try:
        ids = of.ids(messages)
    except MistralCommonException:
        with pytest.raises(Refused) as refused:
            of.encode(messages)
        assert (refused.value.reason, refused.value.field) == ("bad_message", "messages")
    else:
        assert of.encode(messages) == ids


@pytest.mark.parametrize("messages", LISTED.values(), ids=LISTED)
@pytest.mark.parametrize("family", ["mistral", "nemo", "llama"])
def test_every_shape_of_a_conversation_has_the_makers_ids(
    family: str, messages: list[ChatMessage], request: pytest.FixtureRequest
):
    of: Family = request.getfixturevalue(family)
    assert of.encode(messages) == of.ids(messages)


@pytest.mark.parametrize("text", ["語" * 60_000, "a" + " " * 50_001 + "b", "x" * 25_000, "1" * 25_001 + "\n" * 25_001])
def test_very_long_words_have_metas_ids(llama: Family, text: str):
    messages = [says("user", text)]
    assert llama.encode(messages) == llama.ids(messages)


@pytest.mark.parametrize(
    ("messages", "todo"),
    [
        ([says("assistant", "Well")], "put a user message before"),
        ([says("user", "Hi"), says("assistant", "Well"), says("system", "Be brief."), says("user", "Why?")], "move it up"),
        ([says("user", "Hi"), says("assistant", ""), says("user", "Why?")], "leave it out"),
    ],
)
def test_what_mistrals_format_cannot_express_is_refused_with_what_to_do(
    mistral: Family, messages: list[ChatMessage], todo: str
):
    with pytest.raises(MistralCommonException):
        mistral.ids(messages)
    with pytest.raises(Refused, match=todo) as refused:
        mistral.encode(messages)
    assert (refused.value.reason, refused.value.field) == ("bad_message", "messages")


@pytest.mark.parametrize(
    ("family", "ends"),
    [("mistral", ["</s>"]), ("nemo", ["</s>"]), ("llama", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])],
)
def test_an_answer_ends_where_its_maker_ends_it(family: str, ends: list[str], request: pytest.FixtureRequest):
    of: Family = request.getfixturevalue(family)
    made = of.handler.request(of.model, "key", [1], GenerationOptions())
    assert made.end_token_ids == {of.model.tokenizer.token_to_id(text) for text in ends}


@pytest.mark.parametrize(("family", "begin"), [("mistral", "<s>"), ("llama", "<|begin_of_text|>")])
def test_a_raw_prompt_begins_once_and_keeps_its_control_tokens(family: str, begin: str, request: pytest.FixtureRequest):
    of: Family = request.getfixturevalue(family)
    end = "</s>" if family == "mistral" else "<|eot_id|>"
    for prompt in (f"Hi{end}", f"{begin}Hi{end}"):
        tokens = [of.model.tokenizer.id_to_token(i) for i in of.handler.encode_prompt(of.model, prompt)]
        assert (tokens[0], tokens[1].strip("▁"), tokens[2:]) == (begin, "Hi", [end])


# Folders.


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    makers.mistral_folder(root / makers.MISTRAL)
    makers.llama_folder(root / makers.LLAMA)
    return root


@pytest.mark.parametrize("name", [makers.MISTRAL, makers.LLAMA])
@given(content=contents.filter(lambda text: not re.search(r"<s>|</s>|\[/?INST\]|<unk>|<\|", text)))
@settings(max_examples=40, deadline=None)
def test_through_the_folders_template_a_conversation_has_the_ids_that_transformers_gives_it(
    root: Path, templated: dict[str, tuple[Any, LoadedModel]], name: str, content: str
):
    tokenizer, model = templated[name]
    messages = [says("system", content), says("user", f"{content}Why?"), says("assistant", "x"), says("user", content)]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert BaseModelHandler().encode_chat(model, messages) == expected


@pytest.fixture(scope="module")
def templated(root: Path) -> dict[str, tuple[Any, LoadedModel]]:
    made = {}
    for name in (makers.MISTRAL, makers.LLAMA):
        tokenizer = AutoTokenizer.from_pretrained(root / name, local_files_only=True)
        template = _chat_template(tokenizer)
        made[name] = (
            tokenizer,
            LoadedModel(EchoRunner(), tokenizer.backend_tokenizer, 4096, 1 << 17, "none", "cpu", template),
        )
    return made


@pytest.mark.parametrize("name", ["llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"])
def test_llama_is_found_by_either_name_whichever_its_folder_has(tmp_path: Path, name: str):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text("{}")
    listing = list_models(tmp_path)
    for known in Llama.also_listed_as:
        assert (listing[known].id, listing[known].handler, listing[known].folder) == (name, Llama, tmp_path / name)


def test_two_folders_of_one_model_are_each_found_by_their_own_name(tmp_path: Path):
    for name in Llama.also_listed_as:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    listing = list_models(tmp_path)
    assert {name: listing[name].folder for name in Llama.also_listed_as} == {
        name: tmp_path / name for name in Llama.also_listed_as
    }


# Over a socket, in bfloat16.

CHAT = [says("system", "Be brief."), says("user", " What is </s><|eot_id|>[INST]?\n")]


async def assert_streams(server: Running, name: str, ids: list[int], ends: Sequence[int]) -> None:
    async with server.client() as client:
        await client.send(type="init", model=name)
        ready = await client.until("ready")
        # By whatever name it was asked for, a model has one id, its folder's.
        assert (ready["model"]["id"], ready["model"]["dtype"]) == (server.models.listing[name].id, "bfloat16")
        done = await client.generate(id="g", messages=CHAT, temperature=0, max_tokens=12, ignore_eos=True)
        assert (done["finish_reason"], done["usage"]["prompt_tokens"]) == ("length", len(ids))
        assert done["joined"]
        assert sum(frame["n"] for frame in client.of("g", "token")) <= 12
        for end in ends:
            done = await client.generate(id=f"e{end}", messages=CHAT, logit_bias={str(end): 100.0}, max_tokens=5)
            assert (done["finish_reason"], done["joined"]) == ("stop", "")


@pytest.mark.parametrize("name", [makers.MISTRAL, makers.LLAMA, "llama/Llama-3.2-3B-Instruct"])
async def test_a_family_streams_over_a_socket(root: Path, mistral: Family, llama: Family, name: str):
    of, ends = (mistral, [2]) if name == makers.MISTRAL else (llama, [128001, 128008, 128009])
    async with running(root=root, model=name, dtype="bfloat16") as server:
        await assert_streams(server, name, of.ids(CHAT), ends)
