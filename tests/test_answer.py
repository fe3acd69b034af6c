"""One request's way from sampled ids to parts; what becomes of the text is the detokenizer's, and tested with it."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from LLM.engine.answer import HIDDEN, Answer
from LLM.engine.request import Alternative, Delta, FinishReason, GenerationRequest, Scored
from LLM.engine.sequence import Sequence
from LLM.engine.stream import GenerationStream

END = 7
PIECES = {"<s>": 0, "▁Hello": 1, "▁world": 2, "ing": 3, "<0xC3>": 4, "<0xA9>": 5, "▁": 6, "</s>": END}


def tokenizer(decoder: Any) -> Tokenizer:
    made = Tokenizer(models.WordLevel(PIECES, unk_token="<s>"))
    made.decoder = decoder
    made.add_special_tokens(["<s>", "</s>"])
    return made


# As Llama 2 and Mistral have it: a leading space is left out where a text begins, and there are tokens of single bytes.
SENTENCEPIECE = tokenizer(
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # type: ignore[list-item]
    )
)
METASPACE = tokenizer(decoders.Metaspace())


def answer(tokens: Tokenizer = SENTENCEPIECE, prompt: tuple[int, ...] = (0, 1), max_tokens: int = 99, **of: Any) -> Answer:
    request = GenerationRequest("k", prompt, max_tokens, end_token_ids=frozenset({END}), **of)
    return Answer(GenerationStream(request, lambda stream: None, lambda stream: None), Sequence(request), tokens)


def take(answer: Answer, *token_ids: int) -> list[tuple[Delta | None, FinishReason | None]]:
    """Hand over tokens, each with as many alternatives as were asked for, less likely the later it comes."""
    count, taken = answer.request.logprobs, []
    for place, token_id in enumerate(token_ids):
        told = [(token_id, -place / 4), *((other, -other / 2) for other in range(1, 1 + (count or 0)))]
        taken.append(answer.take(token_id, tuple(Alternative(*pair) for pair in told) if count is not None else ()))
    return taken


def test_a_delta_has_an_entry_for_each_token_it_took_and_none_for_any_before() -> None:
    taken = take(answer(logprobs=0), 2, 4, 5, 3)
    assert taken == [
        (Delta(" world", 1, ((Scored(2, " world", 0.0),),)), None),
        (None, None),
        (Delta("é", 2, ((Scored(4, None, -0.25),), (Scored(5, None, -0.5),))), None),
        (Delta("ing", 1, ((Scored(3, "ing", -0.75),),)), None),
    ]


def test_the_alternatives_follow_the_token_itself() -> None:
    [(delta, _)] = take(answer(logprobs=2), 3)
    assert delta
    assert delta.logprobs == ((Scored(3, "ing", 0.0), Scored(1, " Hello", -0.5), Scored(2, " world", -1.0)),)


def test_without_being_asked_for_no_log_probability_is_told() -> None:
    assert [delta.logprobs for delta, _ in take(answer(), 2, 3) if delta] == [(), ()]


@pytest.mark.parametrize("tokens", [SENTENCEPIECE, METASPACE], ids=["sentencepiece", "metaspace"])
def test_the_texts_of_the_entries_joined_are_the_answers(tokens: Tokenizer) -> None:
    taken = take(answer(tokens, logprobs=0), 2, 3, 1, 6, 2)
    deltas = [delta for delta, _ in taken if delta]
    told = "".join(entry.text or "" for delta in deltas for (entry,) in delta.logprobs)
    assert told == "".join(delta.text for delta in deltas) == " worlding Hello  world"


def test_the_text_of_a_special_token_is_told_though_it_is_never_shown() -> None:
    hidden = Scored(0, "<s>", 0.0), Scored(1, " Hello", -0.5)
    shown = Scored(2, " world", -0.25), Scored(1, " Hello", -0.5)
    assert take(answer(logprobs=1), 0, 2) == [(None, None), (Delta(" world", 2, (hidden, shown)), None)]


@pytest.mark.parametrize(
    ("token_ids", "of", "deltas", "reason"),
    [
        ((2, END), {}, [(" world", [2]), None], "stop"),
        ((2, 3), {"max_tokens": 2}, [(" world", [2]), ("ing", [3])], "length"),
        ((3, 4), {"max_tokens": 2}, [("ing", [3]), None], "length"),  # half a character is never shown
        ((3, 2), {"stop": (" wo",)}, [("ing", [3]), None], "stop"),
        ((2, 3), {"stop": ("di",)}, [(" worl", [2]), None], "stop"),
        ((2, 3, END), {"stop": ("ding!",)}, [(" worl", [2]), None, ("ding", [3, END])], "stop"),
        ((2, 3), {"stop": ("ding!",), "max_tokens": 2}, [(" worl", [2]), ("ding", [3])], "length"),
    ],
)
def test_at_its_end_what_was_held_back_comes_with_its_entries(
    token_ids: tuple[int, ...], of: dict[str, Any], deltas: list[tuple[str, list[int]] | None], reason: FinishReason
) -> None:
    this = answer(logprobs=0, **of)
    taken = take(this, *token_ids)
    assert [delta and (delta.text, [entry.token_id for (entry,) in delta.logprobs]) for delta, _ in taken] == deltas
    assert all(delta.n == len(delta.logprobs) for delta, _ in taken if delta)
    assert [end for _, end in taken] == [None] * (len(taken) - 1) + [reason]
    assert this.finished(reason).completion_tokens == len(token_ids)


def test_tokens_that_show_nothing_are_told_now_and_then_and_their_log_probabilities_with_them() -> None:
    some = answer(logprobs=2, max_tokens=999)
    taken = take(some, *[0] * 200)
    told = [delta for delta, _ in taken if delta]
    assert [(delta.text, delta.n, len(delta.logprobs)) for delta in told] == [("", HIDDEN, HIDDEN)] * (200 // HIDDEN)
    (delta, _), *_ = take(some, 2)
    assert delta == Delta(" world", 1 + 200 % HIDDEN, delta.logprobs if delta else ())
    assert len(some._unseen_logprobs) == 0


def test_what_is_held_back_for_a_stop_string_is_counted_too() -> None:
    some = answer(stop=(" world" * 50,), max_tokens=999)
    deltas = [delta for delta, _ in take(some, *[2] * 49) if delta]
    assert deltas == [Delta("", HIDDEN)]
