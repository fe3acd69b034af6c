from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLM.engine.kv_cache import ROOT, chain
from LLM.engine.request import GenerationRequest
from LLM.engine.sequence import Sequence, Slice, TokenCounts

ids = st.lists(st.integers(0, 5), max_size=20)


def sequence(prompt: int, completion: int = 0, max_tokens: int = 9) -> Sequence:
    made = Sequence(GenerationRequest("k", tuple(range(prompt)), max_tokens))
    made.token_ids += range(100, 100 + completion)
    return made


def test_a_new_sequence_holds_its_prompt_and_nothing_else() -> None:
    new = sequence(3)
    assert new.token_ids == [0, 1, 2]
    assert (new.completion_ids, new.completion_tokens, new.computed) == ([], 0, 0)
    assert (new.blocks, new.began, new.cached_tokens) == ([], False, 0)


def test_what_is_sampled_joins_the_completion_and_leaves_the_request_alone() -> None:
    running = sequence(3, completion=2)
    running.computed = 4
    assert (running.completion_ids, running.completion_tokens) == ([100, 101], 2)
    assert running.request.prompt_ids == (0, 1, 2)


@pytest.mark.parametrize(
    ("prompt", "completion", "computed", "decoding"), [(1, 0, 0, False), (4, 0, 3, False), (4, 1, 4, True), (4, 2, 4, False)]
)
def test_it_decodes_when_only_its_last_token_is_missing_and_that_was_sampled(
    prompt: int, completion: int, computed: int, decoding: bool
) -> None:
    running = sequence(prompt, completion)
    running.computed = computed
    assert running.decoding == decoding


@pytest.mark.parametrize(("prompt", "max_tokens", "most"), [(1, 1, 1), (5, 1, 5), (5, 4, 8)])
def test_the_last_token_sampled_needs_no_place_in_the_cache(prompt: int, max_tokens: int, most: int) -> None:
    assert sequence(prompt, max_tokens=max_tokens).request.most_tokens == most


@pytest.mark.parametrize(
    ("prompt", "completion", "start", "stop", "decodes", "samples"),
    [
        (4, 0, 0, 3, False, False),
        (4, 0, 0, 4, False, True),
        (4, 0, 3, 4, False, True),  # the rest of a prompt is prefill, however little it is
        (1, 0, 0, 1, False, True),
        (4, 1, 4, 5, True, True),
        (4, 3, 6, 7, True, True),
        (4, 3, 0, 6, False, False),  # computed again after a preemption
        (4, 3, 4, 7, False, True),
        (4, 3, 5, 6, False, False),
    ],
)
def test_a_slice_knows_what_it_is(prompt: int, completion: int, start: int, stop: int, decodes: bool, samples: bool) -> None:
    part = Slice(sequence(prompt, completion), start, stop)
    assert (part.decodes, part.samples, part.begins) == (decodes, samples, False)


@pytest.mark.parametrize("size", [1, 2, 3])
@given(indices=st.lists(st.integers(0, 3), max_size=6))
def test_hashes_are_those_of_the_chain_whenever_they_are_asked_for(size: int, indices: list[int]) -> None:
    running = sequence(2 * size + 1, completion=2 * size)
    blocks = [running.token_ids[index * size : (index + 1) * size] for index in range(4)]
    expected = list(accumulate(blocks, chain, initial=ROOT))[1:]
    assert [running.block_hash(index, size) for index in indices] == [expected[index] for index in indices]


def test_no_hash_is_computed_before_it_is_asked_for_nor_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[list[int]] = []
    monkeypatch.setattr("LLM.engine.sequence.chain", lambda parent, ids: hashed.append(list(ids)) or parent)
    long = sequence(9)
    for index in (1, 0, 1, 2):
        long.block_hash(index, 2)
        assert hashed == [[0, 1], [2, 3], [4, 5]][: max(index, 1) + 1]


def counted(counts: TokenCounts) -> tuple[list[int], dict[int, int]]:
    assert len(counts.made) == len(counts.times)
    assert len(set(counts.made)) == len(counts.made)
    return list(counts.seen), dict(zip(counts.made, counts.times, strict=True))


@given(prompt=ids, chunks=st.lists(ids, max_size=5))
def test_token_counts_are_those_of_a_counter_however_the_tokens_came(prompt: list[int], chunks: list[list[int]]) -> None:
    grown = Sequence(GenerationRequest("k", tuple(prompt), 99))
    for chunk in [[], *chunks]:
        grown.token_ids += chunk
        seen, times = counted(grown.counts())
        assert seen == list(dict.fromkeys(grown.token_ids)), "each id once, in the order in which they came"
        assert times == Counter(grown.completion_ids)
        assert counted(grown.counts()) == (seen, times), "counted once only"
