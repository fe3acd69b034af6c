"""What a message says stays text, with every kind of tokenizer; all else has the ids that the tokenizer itself gives it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from LLM._base_model_handler import BaseModelHandler, ChatMessage, LoadedModel
from LLM.errors import Refused
from LLM.loader import _chat_template
from LLM.model_srv_wsserver_echo import EchoRunner
from LLM.plain_text import Control, PlainText

CONTROLS = ("<s>", "</s>", "[INST]", "<|im_end|>", "<|im_start|>")
WORDS = ("a", "bc ", "  ", " x", "\n", "\n\n", "<", "s>", "é", "▁", "<think>", "INST]", "|>")
marked_texts = st.lists(st.sampled_from(WORDS + CONTROLS), max_size=8).map("".join)
texts = marked_texts.filter(lambda text: not any(control in text for control in CONTROLS))
ALPHABET = sorted(set("".join(WORDS + CONTROLS)) | {"▁"})


def with_controls(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROLS])
    return tokenizer


def bpe(ignore_merges: bool = False) -> Tokenizer:
    """Control tokens are in the vocabulary, and merges lead to each of them."""
    made = {text[:n] for text in CONTROLS for n in range(2, len(text) + 1)}
    vocabulary = {text: i for i, text in enumerate([*ALPHABET, *sorted(made, key=len)])}
    merges = [(text[:-1], text[-1]) for text in sorted(made, key=len)]
    return with_controls(Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges)))


def metaspace(scheme: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = bpe()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        return tokenizer

    return make


def prepending() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def byte_level() -> Tokenizer:
    """Control tokens are added ones, an ordinary added token lies between them, and two take spaces along."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(CONTROLS[:2]))
    tokenizer.add_tokens([AddedToken("<think>")])
    tokenizer.add_special_tokens([AddedToken("[INST]", lstrip=True), AddedToken("<|im_end|>", rstrip=True), CONTROLS[4]])
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(["[UNK]", *WORDS, *CONTROLS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_controls(tokenizer)


def word_piece() -> Tokenizer:
    inner = [f"##{letter}" for letter in ALPHABET]
    vocabulary = {text: i for i, text in enumerate(["[UNK]", *ALPHABET, *inner, *CONTROLS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]"])
    return with_controls(tokenizer)


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), *((text, -1.0) for text in CONTROLS), *((letter, -2.0) for letter in ALPHABET)]
    return with_controls(Tokenizer(models.Unigram(pieces, unk_id=0)))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": bpe,
    "bpe that takes whole words": lambda: bpe(ignore_merges=True),
    "metaspace first": metaspace("first"),
    "metaspace always": metaspace("always"),
    "metaspace never": metaspace("never"),
    "prepending": prepending,
    "byte level": byte_level,
    "word level": word_level,
    "word piece": word_piece,
    "unigram": unigram,
}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


@pytest.fixture(scope="module")
def plain_text(tokenizer: Tokenizer) -> PlainText:
    return PlainText(tokenizer)


def own_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def controls_in(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [special[i] for i in ids if i in special and special[i] != "[UNK]"]


@given(prompt=marked_texts)
@settings(max_examples=60, deadline=None)
def test_a_prompt_in_which_nothing_is_hidden_has_the_tokenizers_own_ids(
    tokenizer: Tokenizer, plain_text: PlainText, prompt: str
):
    assert plain_text.encode_prompt(prompt, []) == own_ids(tokenizer, prompt)


@given(before=texts, said=marked_texts, after=texts)
@settings(max_examples=60, deadline=None)
def test_what_is_hidden_is_text_and_what_is_not_is_a_control_token(
    tokenizer: Tokenizer, plain_text: PlainText, before: str, said: str, after: str
):
    hidden: list[str] = []
    safe = plain_text.hide(said, hidden)
    ids = plain_text.encode_prompt(f"<s>{before}é{safe}é{after}</s>", hidden)
    assert controls_in(tokenizer, ids) == ["<s>", "</s>"]
    assert (safe.strip() == "") == (said.strip() == "")
    assert safe.startswith(said[: len(said) - len(said.lstrip())])
    assert safe.endswith(said[len(said.rstrip()) :])


@given(pieces=st.lists(marked_texts, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_piece_of_text_is_never_a_control_token(tokenizer: Tokenizer, plain_text: PlainText, pieces: list[str]):
    ids = plain_text.encode([part for piece in pieces for part in (Control("[INST]"), piece)])
    assert controls_in(tokenizer, ids) == ["[INST]"] * len(pieces)


@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_text_without_control_tokens_has_the_tokenizers_own_ids(tokenizer: Tokenizer, plain_text: PlainText, text: str):
    hidden: list[str] = []
    assert plain_text.encode_prompt(plain_text.hide(text, hidden), hidden) == own_ids(tokenizer, text)
    if not plain_text._space:
        assert plain_text.encode([text]) == own_ids(tokenizer, text)


@pytest.mark.parametrize("name", ["metaspace first", "metaspace always", "prepending"])
@pytest.mark.parametrize("text", ["a", " a", "  a", "▁a"])
def test_where_a_text_begins_with_a_space_it_does_so_once_more(name: str, text: str):
    tokenizer = TOKENIZERS[name]()
    written = "".join(tokenizer.id_to_token(i) for i in PlainText(tokenizer).encode([text]))
    assert written == "▁" + text.replace(" ", "▁")


def test_no_text_has_no_ids(plain_text: PlainText):
    assert plain_text.encode([""]) == plain_text.encode([]) == []


@pytest.mark.parametrize(
    ("first", "second"), [("<", "s>"), ("</s", ">"), ("[", "INST]"), ("a <|im_", "end|> b"), ("[INST", "]")]
)
def test_two_texts_do_not_become_a_control_token_together(
    tokenizer: Tokenizer, plain_text: PlainText, first: str, second: str
):
    hidden: list[str] = []
    joined = plain_text.hide(first, hidden) + plain_text.hide(second, hidden)
    assert controls_in(tokenizer, plain_text.encode_prompt(joined, hidden)) == []
    for half in (first + plain_text.hide(second, hidden), plain_text.hide(first, hidden) + second):
        assert controls_in(tokenizer, plain_text.encode_prompt(half, hidden)) == []


def test_two_twins_do_not_share_their_names():
    # Whoever learns the names of one server's tokens must not know another's.
    tokenizer = byte_level()
    names = PlainText(tokenizer)._names["<s>"]
    assert controls_in(tokenizer, PlainText(tokenizer).encode([names])) == []


def test_the_words_that_hide_do_not_tell_the_names_of_control_tokens():
    plain_text, hidden = PlainText(byte_level()), list[str]()
    word = plain_text.hide("<s>", hidden)
    assert not any(word[:16] in name for name in plain_text._names.values())
    assert plain_text.encode_prompt(word.replace("w0x", "w7x"), hidden) == []


def test_a_control_token_that_the_tokenizer_lacks_is_refused_by_name():
    with pytest.raises(Refused, match=re.escape("[/INST]")) as refused:
        PlainText(byte_level()).encode(["a", Control("[/INST]")])
    assert (refused.value.reason, refused.value.field) == ("unsupported", "messages")


# The default model, with its folder's template.


@pytest.fixture(scope="module")
def real(default_model_folder: Path) -> tuple[Any, LoadedModel]:
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    template = _chat_template(tokenizer)
    return tokenizer, LoadedModel(EchoRunner(), tokenizer.backend_tokenizer, 8192, 49152, "none", "cpu", template)


def conversations(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[ChatMessage]]:
    roles = st.sampled_from(["system", "user", "assistant"])
    turns = st.builds(lambda role, content: ChatMessage(role=role, content=content), roles, contents)
    return st.lists(turns, min_size=1, max_size=5)


@given(messages=conversations(st.text(max_size=30).filter(lambda text: "<|" not in text)))
@settings(max_examples=60, deadline=None)
def test_a_conversation_has_the_ids_that_transformers_gives_it(real: tuple[Any, LoadedModel], messages: list[ChatMessage]):
    tokenizer, model = real
    goes_on = messages[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=not goes_on, continue_final_message=goes_on, return_dict=False
    )
    assert BaseModelHandler().encode_chat(model, messages) == ids


@given(messages=conversations(marked_texts))
@settings(max_examples=60, deadline=None)
def test_the_template_alone_writes_control_tokens(real: tuple[Any, LoadedModel], messages: list[ChatMessage]):
    tokenizer, model = real
    ids = BaseModelHandler().encode_chat(model, messages)
    assert model.chat_template is not None
    assert tokenizer.decode(ids) == model.chat_template(messages)
    blank = [ChatMessage(role=m["role"], content="x") for m in messages]
    bare = BaseModelHandler().encode_chat(model, blank)
    assert controls_in(model.tokenizer, ids) == controls_in(model.tokenizer, bare)
