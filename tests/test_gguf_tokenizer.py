"""Tokenizers out of GGUF files: the ids are those of the makers' own, each file written from a true tokenizer."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer

from LLM import gguf_file
from LLM.gguf_tokenizer import tokenizer_of
from LLM.loading.steady_file import SteadyFile
from tests.gguf_writer import add_tokenizer, finish
from tests.makers import llama_tokenizer, mistral_tokenizer, nemo_tokenizer

TEXTS = [
    "",
    "The capital of France is Paris.",
    " a  b   c ",
    "one\ntwo\n\n\tthree\r\n\n\n",
    "2026 12345 3.14",
    "žluťoučký kůň 😀👩‍👩‍👧 𓀀 漢字 ﷽",
    "don't I'LL we'Ve",
    "x" * 300,
    "def f(x):\n    return {x: 1}",
    "\x00\x7f\u00a0\u2028",
]
MAKERS: dict[str, tuple[Callable[[Path], Tokenizer], str]] = {
    "Mistral": (lambda _: mistral_tokenizer(), ""),
    "Llama 3": (lambda _: llama_tokenizer(), "llama-bpe"),
    "Mistral-Nemo": (lambda folder: nemo_tokenizer(folder / "ranks"), "tekken"),
}


def of_gguf(path: Path, tokenizer: Tokenizer, pre: str, begin: int | None) -> Tokenizer:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer, pre)
    if begin is not None:
        writer.add_bos_token_id(begin)
    finish(writer)
    return tokenizer_of(gguf_file.read(SteadyFile(path))).backend_tokenizer


def assert_the_same(made: Tokenizer, real: Tokenizer) -> None:
    added = [token.content for token in real.get_added_tokens_decoder().values()]
    for text in [*TEXTS, *(f"{token}a {token} \n{token}" for token in added[:12])]:
        ids = real.encode(text).ids
        assert made.encode(text).ids == ids, text
        for skip in (True, False):
            assert made.decode(ids, skip_special_tokens=skip) == real.decode(ids, skip_special_tokens=skip), text


@pytest.mark.parametrize(("maker", "pre"), MAKERS.values(), ids=MAKERS)
def test_a_tokenizer_is_the_makers(tmp_path: Path, maker: Callable[[Path], Tokenizer], pre: str):
    real = maker(tmp_path)
    assert_the_same(of_gguf(tmp_path / "model.gguf", real, pre, real.encode("").ids[0]), real)


def test_digits_are_cut_one_by_one_where_the_model_was_trained_so(tmp_path: Path, default_model_folder: Path):
    real = Tokenizer.from_file(str(default_model_folder / "tokenizer.json"))
    made = of_gguf(tmp_path / "model.gguf", real, "smollm", None)
    assert_the_same(made, real)
    assert made.encode("2026").tokens == ["2", "0", "2", "6"]
