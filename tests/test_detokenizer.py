import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from LLM._base_model_handler import LoadOptions
from LLM.engine.detokenizer import CONTEXT, REPLACEMENT, Detokenizer
from LLM.model_srv_wsserver_echo import END, ModelHandler

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int], stop: Sequence[str] = ()) -> list[str]:
    """Give the text of every push up to the stop, and last of all that of the flush."""
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    texts = []
    for token_id in ids:
        texts.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return [*texts, detokenizer.flush()]


def byte_chars() -> list[str]:
    """Give the character that stands for each byte in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARS = byte_chars()
BYTES = ModelHandler().load(Path(), LoadOptions(), lambda stage, done: None).tokenizer
BYTE_IDS = [BYTES.token_to_id(char) for char in BYTE_CHARS]


def byte_ids(text: str | bytes) -> list[int]:
    return [BYTE_IDS[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def chunked(chunks: Sequence[bytes]) -> tuple[Tokenizer, list[int]]:
    """Make a tokenizer whose tokens are these runs of bytes, and give their ids."""
    names = ["".join(BYTE_CHARS[byte] for byte in chunk) for chunk in chunks]
    vocabulary = {name: id for id, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names[0]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, [vocabulary[name] for name in names]


def cut(data: bytes, borders: Iterable[int]) -> list[bytes]:
    places = sorted({0, *borders, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def all_cuts(data: bytes) -> Iterable[list[bytes]]:
    inner = range(1, len(data))
    return (cut(data, borders) for n in range(len(data)) for borders in itertools.combinations(inner, n))


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """What an answer must come to: look after every character whether a stop string has just become complete."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - len(max(complete, key=len))], True
    return text, False


def begun_stop(text: str, stop: Sequence[str]) -> int:
    return max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)


# Whole characters.


def test_a_character_comes_with_its_last_byte_and_never_in_parts() -> None:
    assert pieces(BYTES, [], byte_ids("hé😀")) == ["h", "", "é", "", "", "", "😀", ""]


@pytest.mark.parametrize("incomplete", [b"\xc3", b"\xe8\xaa", b"\xf0\x9f\x98"])
def test_an_incomplete_last_character_is_never_shown(incomplete: bytes) -> None:
    assert "".join(pieces(BYTES, [], byte_ids(b"ab" + incomplete))) == "ab"


def test_letters_before_an_incomplete_character_in_one_token_come_at_the_end() -> None:
    tokenizer, ids = chunked([b"x", b"ab\xf0\x9f"])
    assert pieces(tokenizer, [], ids) == ["x", "", "ab"]


def test_a_character_that_bytes_cannot_make_is_shown_as_the_tokenizer_shows_it() -> None:
    assert "".join(pieces(BYTES, [], byte_ids(b"a\xffb\xc3(c"))) == f"a{REPLACEMENT}b{REPLACEMENT}(c"


def test_the_replacement_character_itself_is_text_where_text_follows() -> None:
    assert "".join(pieces(BYTES, [], byte_ids(f"a{REPLACEMENT}b"))) == f"a{REPLACEMENT}b"


def test_special_tokens_are_not_shown_and_do_no_harm_between_halves_of_a_character() -> None:
    first, *rest = byte_ids("é")
    assert "".join(pieces(BYTES, [END], [END, *byte_ids("a"), first, END, *rest, END])) == "aé"


def test_an_answer_of_nothing_is_empty() -> None:
    assert pieces(BYTES, byte_ids("prompt"), []) == [""]


@QUICK
@given(prompt=st.text(max_size=12), answer=st.text(max_size=12), missing=st.integers(0, 3))
def test_any_text_byte_by_byte_is_shown_whole_as_far_as_its_characters_are(prompt: str, answer: str, missing: int) -> None:
    data = answer.encode()[: -missing or None]
    whole = data.decode(errors="ignore")
    assert "".join(pieces(BYTES, byte_ids(prompt), byte_ids(data))) == whole.rstrip(REPLACEMENT)


@pytest.fixture(scope="session")
def real(default_model_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(default_model_folder / "tokenizer.json"))


TEXTS = [
    "naïve façade",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "Привет, мир",
    "نص عربي",
    "  two  spaces\n\n\ttab",
    "e\u0301",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_real_tokenizers_text_comes_whole_and_without_cut_characters(real: Tokenizer, text: str) -> None:
    shown = pieces(real, real.encode("<|im_start|>assistant\n").ids, real.encode(text, add_special_tokens=False).ids)
    assert "".join(shown) == text
    assert not any(REPLACEMENT in piece for piece in shown)


@QUICK
@given(prompt=st.sampled_from(["", "<|im_start|>", "Hello", "語", f"a{REPLACEMENT}"]), data=st.data())
def test_any_ids_of_a_real_tokenizer_join_to_their_decoding(real: Tokenizer, prompt: str, data: st.DataObject) -> None:
    # Ids at random seldom make characters of more than one token; those from a text do.
    runs = st.one_of(st.integers(0, 49151).map(lambda id: [id]), st.sampled_from([real.encode(t).ids for t in TEXTS]))
    ids = list(itertools.chain(*data.draw(st.lists(runs, max_size=8))))
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    shown = "".join(pieces(real, real.encode(prompt).ids, ids))
    assert shown == real.decode(ids, skip_special_tokens=True).rstrip(REPLACEMENT)


# Stop strings.


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("aENDb", ["END"]),
        ("a語b", ["語"]),
        ("aé語b", ["é語"]),
        ("aababac", ["abac"]),
        ("abcd", ["bcd", "c"]),
        ("abcd", ["abcd", "bc"]),
        ("abcd", ["cd", "bcd", "d"]),
        ("xababab", ["abab"]),
        ("aaab", ["aab", "aaa"]),
        ("a\n\nb", ["\n\n"]),
        ("ENDab", ["END"]),
        ("aEN", ["END"]),
        ("😀b", ["😁"]),
        ("abc", []),
    ],
)
def test_a_stop_string_ends_the_text_at_the_same_place_wherever_tokens_end(text: str, stop: list[str]) -> None:
    expected = cut_at_stop(text, stop)
    for chunks in all_cuts(text.encode()):
        tokenizer, ids = chunked(chunks)
        detokenizer = Detokenizer(tokenizer, [], stop)
        shown = "".join([detokenizer.push(id) for id in ids if not detokenizer.stopped]) + detokenizer.flush()
        assert (shown, detokenizer.stopped) == expected, chunks


@QUICK
@given(
    text=st.text("ab語😀", max_size=14),
    stop=st.lists(st.text("ab語😀", min_size=1, max_size=5), max_size=4),
    borders=st.sets(st.integers(1, 50)),
)
def test_any_text_with_any_stop_strings_is_cut_as_if_read_character_by_character(
    text: str, stop: list[str], borders: set[int]
) -> None:
    data = text.encode()
    chunks = cut(data, {b for b in borders if b < len(data)}) if data else []
    tokenizer, ids = chunked(chunks or [b"x"])
    detokenizer = Detokenizer(tokenizer, ids[:1], stop)
    shown, read = "", b""
    for id, chunk in zip(ids, chunks, strict=False):
        shown += detokenizer.push(id)
        read += chunk
        if detokenizer.stopped:
            break
        # What is shown is safe, and nothing is held back without need.
        if read.decode(errors="ignore").encode() == read:
            whole = read.decode()
            assert shown == whole[: len(whole) - begun_stop(whole, stop)]
    assert (shown + detokenizer.flush(), detokenizer.stopped) == cut_at_stop(text, stop)


def test_what_may_become_a_stop_string_is_held_until_it_cannot() -> None:
    assert pieces(BYTES, [], byte_ids("aENEND"), ["END!", "NO"]) == ["a", "", "", "EN", "", "", "END"]


def test_a_natural_end_releases_what_was_held() -> None:
    assert pieces(BYTES, [], byte_ids("aEN"), ["END"]) == ["a", "", "", "EN"]


def test_what_was_held_and_an_incomplete_character_end_as_the_held_text() -> None:
    assert "".join(pieces(BYTES, [], byte_ids(b"aEN\xe8"), ["END"])) == "aEN"


def test_a_stop_string_found_only_at_the_end_still_cuts() -> None:
    tokenizer, ids = chunked([b"x", b"abc\xe8"])
    detokenizer = Detokenizer(tokenizer, [], ["bc"])
    assert [detokenizer.push(id) for id in ids] == ["x", ""]
    assert not detokenizer.stopped
    assert detokenizer.flush() == "a"
    assert detokenizer.stopped
    assert detokenizer.flush() == ""


def test_after_a_stop_nothing_is_left_to_flush() -> None:
    detokenizer = Detokenizer(BYTES, [], ["b"])
    assert [detokenizer.push(id) for id in byte_ids("ab")] == ["a", ""]
    assert (detokenizer.stopped, detokenizer.flush()) == (True, "")


def test_a_stop_string_in_the_prompt_is_none_of_the_answers() -> None:
    assert "".join(pieces(BYTES, byte_ids("xEND"), byte_ids("aENDb"), ["END"])) == "a"
    assert "".join(pieces(BYTES, byte_ids("xEN"), byte_ids("Da"), ["END"])) == "Da"


# Decoders that drop a leading space, and those that fall back to bytes, as the Llama and Mistral families have them.

PLAIN = ["▁", "▁a", "a", "b", "▁▁b", "語", REPLACEMENT, "<s>"]
LLAMA_VOCABULARY = {name: id for id, name in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *PLAIN])}
DECODERS = {
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}


@pytest.fixture(params=DECODERS, scope="session")
def llama(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_fallback(request.param)


def byte_fallback(decoder: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(LLAMA_VOCABULARY, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = DECODERS[decoder]
    return tokenizer


def llama_ids(*names: str) -> list[int]:
    """Give the ids of tokens by name, and of what is no token by its bytes."""
    return [id for name in names for id in ([LLAMA_VOCABULARY[name]] if name in LLAMA_VOCABULARY else name.encode())]


@pytest.mark.parametrize(
    "prompt",
    [
        ["a"],
        ["▁a"],
        ["▁"],
        ["a", "<s>"],
        ["<s>", "a", *["<s>"] * (CONTEXT - 1)],
        ["é"],
        ["a", "€", "€", "€"],
        ["€"] * 9,
        ["a", "é", "é", "é", "é", "é"],
        ["a", REPLACEMENT],
        ["a", "b", REPLACEMENT, REPLACEMENT],
    ],
)
def test_an_answer_keeps_its_leading_space(llama: Tokenizer, prompt: list[str]) -> None:
    assert pieces(llama, llama_ids(*prompt), llama_ids("▁a", "b", "▁a")) == [" a", "b", " a", ""]


@pytest.mark.parametrize("prompt", [[], ["<s>"], ["<s>"] * 20])
def test_an_answer_to_a_prompt_without_text_begins_as_the_decoder_begins_a_text(llama: Tokenizer, prompt: list[str]) -> None:
    assert pieces(llama, llama_ids(*prompt), llama_ids("▁a", "▁a")) == ["a", " a", ""]


UNITS = st.sampled_from(["▁", "▁a", "a", "b", "▁▁b", "語", "<s>", "é", "€", "😀"])


@QUICK
@given(prompt=st.lists(UNITS, max_size=8), answer=st.lists(UNITS, max_size=10), rest=st.sampled_from([b"", b"\xf0\x9f"]))
def test_any_units_after_a_text_are_shown_as_they_are(
    llama: Tokenizer, prompt: list[str], answer: list[str], rest: bytes
) -> None:
    shown = pieces(llama, llama_ids("b", *prompt), [*llama_ids(*answer), *rest])
    assert "".join(shown) == "".join(answer).replace("▁", " ").replace("<s>", "")
    assert not any(REPLACEMENT in piece for piece in shown)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("b", ["€", "<0xF0>", "b"]),
        ("€", ["<0xF0>", "b"]),
        ("b", ["<0x0A>", "<0x80>", "b"]),
        ("b", ["é", "<0xC3>", "é", "b"]),
        ("€", ["<0xE2>", "<s>", "b"]),
    ],
)
def test_bytes_that_make_no_character_take_nothing_of_the_text_after_them(
    llama: Tokenizer, prompt: str, answer: list[str]
) -> None:
    assert "".join(pieces(llama, llama_ids(prompt), llama_ids(*answer, "▁a", "b"))).endswith("b ab")


@QUICK
@given(prompt=st.lists(UNITS, max_size=4), ids=st.lists(st.integers(0, len(LLAMA_VOCABULARY) - 2), max_size=12))
def test_no_ids_whatever_break_an_answer(llama: Tokenizer, prompt: list[str], ids: list[int]) -> None:
    assert "".join(pieces(llama, llama_ids(*prompt), [*ids, *llama_ids("b", "▁a", "b")])).endswith("b ab")


# Floods of tokens that make no character.

FLOOD = 2000


def spent(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Give for each push how many ids were handed to the tokenizer; a stream decodes all that it still holds."""
    count = 0

    class Counting:
        def __init__(self, ids: list[int], skip_special_tokens: bool) -> None:
            self.stream = decoders.DecodeStream(ids=ids, skip_special_tokens=skip_special_tokens)
            self.held = len(ids)

        def step(self, tokenizer: Tokenizer, token_id: int) -> str | None:
            nonlocal count
            self.held += 1
            count += self.held
            text = self.stream.step(tokenizer, token_id)
            self.held = self.held if text is None else min(self.held, 8)
            return text

    class Counted:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal count
            count += len(ids)
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

        def id_to_token(self, token_id: int) -> str | None:
            return tokenizer.id_to_token(token_id)

    monkeypatch.setattr("LLM.engine.detokenizer.DecodeStream", Counting)
    detokenizer, costs = Detokenizer(Counted(), prompt, []), []  # type: ignore[arg-type]
    for token_id in ids:
        before = count
        detokenizer.push(token_id)
        costs.append(count - before)
    return costs


def whole(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def is_whole(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> None:
    """Object unless the joined text is the decoding of all ids but for the incomplete character at the end."""
    shown, expected = "".join(pieces(tokenizer, prompt, ids)), whole(tokenizer, ids)
    assert expected.startswith(shown)
    assert set(expected[len(shown) :]) <= {REPLACEMENT}
    assert len(expected) - len(shown) <= 12
    assert shown.rstrip(REPLACEMENT) == expected.rstrip(REPLACEMENT)


@pytest.mark.parametrize("flood", ["special", "unknown", "byte", "letters and half a character", "mixed"])
def test_a_flood_costs_the_same_at_each_push_and_joins_to_its_decoding(
    monkeypatch: pytest.MonkeyPatch, real: Tokenizer, flood: str
) -> None:
    byte = real.token_to_id(BYTE_CHARS[0xF0])
    pattern = {
        "special": [real.token_to_id("<|im_end|>")],
        "unknown": [10**6],
        "byte": [byte],
        "letters and half a character": [*real.encode("ab").ids, byte],
        "mixed": [byte, 10**6, *[real.token_to_id("<|im_start|>")] * 9, real.token_to_id(BYTE_CHARS[0x9F])],
    }[flood]
    ids = (pattern * FLOOD)[:FLOOD]
    after = real.encode(" and text 😀 語").ids
    is_whole(real, real.encode("Hello").ids, [*ids, *after])
    costs = spent(monkeypatch, real, real.encode("Hello").ids, ids)
    assert max(costs) <= 400
    assert sum(costs[-100:]) <= 1.2 * sum(costs[100:200]) + 200


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("flood", ["<0x80>", "<0xF0>", "<s>", "<0xC3> <0xA9> <0xC3>", "<0xF0> <s>", REPLACEMENT])
def test_a_flood_of_byte_tokens_costs_the_same_at_each_push_and_joins_to_its_decoding(
    monkeypatch: pytest.MonkeyPatch, flood: str, decoder: str
) -> None:
    llama = byte_fallback(decoder)
    pattern = llama_ids(*flood.split())
    ids = (pattern * FLOOD)[:FLOOD]
    shown = "".join(pieces(llama, llama_ids("b"), [*ids, *llama_ids("▁a", "😀", "b")]))
    assert shown.endswith("😀b")
    if flood != "<0xC3> <0xA9> <0xC3>":  # whose first character is shown before the run turns out to be no UTF-8
        assert shown[1:] == whole(llama, [*llama_ids("b"), *ids, *llama_ids("▁a", "😀", "b")])[2:]
    costs = spent(monkeypatch, llama, llama_ids("b"), ids)
    assert max(costs) <= 400
    assert sum(costs[-100:]) <= 1.2 * sum(costs[100:200]) + 200


@QUICK
@given(
    ids=st.lists(
        st.sampled_from(
            [*(BYTE_CHARS[byte] for byte in (0x80, 0x9F, 0xA9, 0xC3, 0xE2, 0xF0, 0xE9)), "<|im_end|>", "a", "Ġthe"]
        ),
        min_size=12,
        max_size=60,
    ),
    tail=st.sampled_from(["", "é", "a😀", " x"]),
)
def test_any_long_run_of_odd_ids_of_a_real_tokenizer_joins_to_its_decoding(
    real: Tokenizer, ids: list[str], tail: str
) -> None:
    is_whole(real, real.encode("Hello").ids, [*(real.token_to_id(name) for name in ids), *real.encode(tail).ids])


@QUICK
@given(
    start=st.sampled_from([["b"], ["é", "b"], ["😀", "😀", "a"]]),
    nothing=st.lists(st.sampled_from(["<s>", REPLACEMENT]), min_size=9, max_size=40),
    rest=st.lists(UNITS, min_size=1, max_size=8),
)
def test_whole_characters_after_a_flood_are_shown_as_they_are(
    llama: Tokenizer, start: list[str], nothing: list[str], rest: list[str]
) -> None:
    names = [*start, *nothing, *rest]
    shown = "".join(pieces(llama, llama_ids("b"), llama_ids(*names)))
    expected = "".join(names).replace("▁", " ").replace("<s>", "")
    assert expected.startswith(shown)
    assert shown.rstrip(REPLACEMENT) == expected.rstrip(REPLACEMENT)
