"""The sampler against the textbook in float64, and against transformers' own processors, by its public border only.

What a row of logits may yield is found out by putting in the random number: swept over [0, 1), it makes the sampler draw
every token that may come, as often as it is likely.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from LLM.engine import sampler
from LLM.engine.request import Alternative, GenerationRequest, Sampled, Sampling
from LLM.engine.sampler import Drawn, is_greedy, likeliest, sample, uniform
from LLM.engine.sequence import Sequence

# Derandomised: where floats meet thresholds, a suite must not fail one day in a hundred.
CALM = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

Row = tuple[np.ndarray, Sequence]  # logits [vocabulary], and whose they are

VOCABULARY = 24
GRID = 200  # random numbers per sweep
LARGEST_BELOW_1 = 1 - 2**-53
NAN, INF = float("nan"), float("inf")


def sequence(sampling: Sampling, prompt: Iterable[int] = (0,), made: Iterable[int] = (), **request: object) -> Sequence:
    of = Sequence(GenerationRequest("k", tuple(prompt), 99, sampling, **request))  # type: ignore[arg-type]
    of.token_ids += made
    return of


TOKENS = st.integers(0, VOCABULARY - 1)
LOGITS = st.lists(st.integers(-400, 400), min_size=VOCABULARY, max_size=VOCABULARY, unique=True).map(
    lambda row: np.array(row) / 50.0
)
TIED = st.lists(st.integers(-2, 2), min_size=VOCABULARY, max_size=VOCABULARY).map(lambda row: np.array(row) / 2.0)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(0.2, 4),
    top_p=st.just(1.0) | st.floats(0.05, 1),
    top_k=st.just(0) | st.integers(1, VOCABULARY + 5),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.3, 3),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    logit_bias=st.dictionaries(TOKENS, st.floats(-5, 5), max_size=3),
    seed=st.integers(0, 2**63 - 1),
)
SEQUENCES = st.builds(
    sequence,
    SAMPLINGS,
    st.lists(TOKENS, min_size=1, max_size=6),
    st.lists(TOKENS, max_size=6),
    end_token_ids=st.frozensets(TOKENS, max_size=4),
    min_tokens=st.integers(0, 6),
    logprobs=st.none() | st.integers(0, VOCABULARY),
)
ROWS = st.tuples(LOGITS, SEQUENCES)
BATCHES = st.lists(ROWS, min_size=1, max_size=5)
# A row that is cut, with its likeliest tokens few or many against those the sampler sorts first.
FEW_AND_MANY = pytest.mark.parametrize("candidates", [3, sampler.CANDIDATES])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensor(rows: list[Row], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(np.stack([logits for logits, _ in rows]), dtype=dtype)


def sampled(rows: list[Row]) -> list[Sampled]:
    return sample(tensor(rows), [of for _, of in rows]).read()


def drawn_at(numbers: list[float], rows: list[Row]) -> np.ndarray:
    """Give the tokens [rows, numbers] that are drawn when those are the random numbers."""
    with mock.patch.object(sampler, "uniform", side_effect=cycle(numbers)):
        drawn = sampled([row for row in rows for _ in numbers])
    return np.array([one.token_id for one in drawn]).reshape(len(rows), len(numbers))


def assert_drawn_by(expected: list[np.ndarray], rows: list[Row]) -> None:
    """Each row's tokens come as often as is expected over a sweep, and no other token does."""
    sweep = [(i + 0.5) / GRID for i in range(GRID)]
    ends = drawn_at([0.0, LARGEST_BELOW_1], rows)
    for shares, drawn, (first, last) in zip(expected, drawn_at(sweep, rows), ends, strict=True):
        frequencies = np.bincount(drawn, minlength=len(shares)) / GRID
        assert not frequencies[shares == 0].any()
        assert np.abs(frequencies - shares).max() <= 1 / GRID + 1e-4
        assert shares[first] > 0
        assert shares[last] > 0


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def textbook_scores(logits: np.ndarray, of: Sequence) -> np.ndarray:
    sampling, scores = of.request.sampling, logits.astype(np.float64).copy()
    for token_id, bias in sampling.logit_bias.items():
        scores[token_id] += bias
    for token_id in set(of.token_ids):
        factor = 1 / sampling.repetition_penalty if scores[token_id] > 0 else sampling.repetition_penalty
        scores[token_id] *= factor
    for token_id, times in Counter(of.completion_ids).items():
        scores[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if of.completion_tokens < of.request.min_tokens:
        scores[list(of.request.end_token_ids)] = -INF
    return scores


def textbook(logits: np.ndarray, of: Sequence) -> np.ndarray | None:
    """The probabilities by definition; None for a row with a threshold so near that float32 may see it otherwise."""
    sampling, scores = of.request.sampling, textbook_scores(logits, of) / (of.request.sampling.temperature or 1)
    if np.diff(np.sort(scores[scores > -INF])).min() <= 1e-4:
        return None
    result = np.zeros_like(scores)
    if sampling.temperature == 0:
        result[scores.argmax()] = 1
        return result
    order = np.argsort(-scores)[: sampling.top_k or None]
    shares = softmax(scores[order])
    before, floor = shares.cumsum() - shares, sampling.min_p * shares[0]
    if sampling.top_p < 1 and np.abs(before - sampling.top_p).min() <= 1e-5:
        return None
    if (np.abs(shares[1:] - floor) <= 1e-4 * floor)[shares[1:] > 0].any():
        return None
    kept = ((before < sampling.top_p) | (sampling.top_p == 1)) & (shares >= floor * (1 - 1e-9))
    result[order[kept]] = shares[kept] / shares[kept].sum()
    return result


def by_transformers(logits: np.ndarray, of: Sequence) -> np.ndarray:
    """The probabilities that `generate` would draw from."""
    r, s = of.request, of.request.sampling
    processors = LogitsProcessorList()
    if s.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in s.logit_bias.items()]))
    processors.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if r.end_token_ids:
        processors.append(MinNewTokensLengthLogitsProcessor(len(r.prompt_ids), r.min_tokens, [*r.end_token_ids]))
    processors.append(TemperatureLogitsWarper(s.temperature or 1e-4))
    if s.top_k:
        processors.append(TopKLogitsWarper(s.top_k))
    processors += [TopPLogitsWarper(s.top_p), MinPLogitsWarper(s.min_p)]
    scores = processors(torch.tensor([of.token_ids]), torch.tensor(logits[None], dtype=torch.float32))
    return scores[0].double().softmax(0).numpy()


# Every parameter, in batches where each row has its own.


@FEW_AND_MANY
@CALM
@given(batch=BATCHES)
def test_every_row_of_a_mixed_batch_is_drawn_by_the_textbook(candidates: int, batch: list[Row]):
    expected = [textbook(*row) for row in batch]
    assume(any(shares is not None for shares in expected))
    with mock.patch.object(sampler, "CANDIDATES", candidates):
        judged = [(shares, row) for shares, row in zip(expected, batch, strict=True) if shares is not None]
        assert_drawn_by(*map(list, zip(*judged, strict=True)))


@FEW_AND_MANY
@CALM
@given(batch=BATCHES)
def test_every_row_of_a_mixed_batch_is_drawn_by_transformers_own_processors(candidates: int, batch: list[Row]):
    for _, of in batch:  # which knows no such penalties
        of.request = replace(of.request, sampling=replace(of.request.sampling, presence_penalty=0.0, frequency_penalty=0.0))
    batch = [row for row in batch if textbook(*row) is not None]
    assume(batch)
    with mock.patch.object(sampler, "CANDIDATES", candidates):
        assert_drawn_by([by_transformers(*row) for row in batch], batch)


@FEW_AND_MANY
@CALM
@given(batch=st.lists(st.tuples(LOGITS | TIED, SEQUENCES), min_size=1, max_size=5), dead=st.sampled_from([NAN, -INF]))
def test_a_rows_result_is_the_same_alone_and_in_any_batch(candidates: int, batch: list[Row], dead: float):
    neighbour = np.full(VOCABULARY, dead), sequence(Sampling(temperature=0.5, top_p=0.5), logprobs=3)
    with mock.patch.object(sampler, "CANDIDATES", candidates):
        alone = [sampled([row])[0] for row in batch]
        assert sampled(batch) == alone
        assert sampled([neighbour, *reversed(batch)]) == [Sampled(None), *reversed(alone)]


@CALM
@given(batch=BATCHES)
def test_a_cut_rows_likeliest_token_has_the_smallest_numbers_and_its_least_likely_the_largest(batch: list[Row]):
    for _, of in batch:
        of.request = replace(of.request, sampling=replace(of.request.sampling, temperature=0.7, top_k=5))
    batch = [row for row in batch if textbook(*row) is not None]
    assume(batch)
    for row, (first, last) in zip(batch, drawn_at([0.0, LARGEST_BELOW_1], batch), strict=True):
        shares = textbook(*row)
        assert shares[first] == shares.max()
        # But for rounding: the likeliest may leave the others less than a float32 next to 1 can tell.
        assert shares[last] > 0
        assert shares[shares < shares[last]].sum() < 1e-5


# Without anything but the likeliest.


@pytest.mark.parametrize("size", [1, 63, 64, 640, 1000])
def test_the_likeliest_tokens_are_what_sample_gives_greedy_rows(size: int):
    torch.manual_seed(size)
    logits = torch.randn(8, size).bfloat16()
    logits[1, size // 2], logits[2, -1], logits[3], logits[4, 0] = torch.nan, torch.inf, -torch.inf, -torch.inf
    sequences = [Sequence(GenerationRequest(n, (0,), 5, Sampling(temperature=0))) for n in range(len(logits))]
    assert all(map(is_greedy, sequences))
    told = Drawn.of(likeliest(logits)).read()
    expected = sample(logits, sequences).read()
    for row, (ours, theirs) in enumerate(zip(told, expected, strict=True)):
        assert (ours.token_id is None) == (theirs.token_id is None)
        # Of equally likely ones either may come.
        assert ours.token_id is None or logits[row, ours.token_id] == logits[row, theirs.token_id]


@pytest.mark.parametrize(
    "details",
    [
        {"sampling": Sampling(temperature=0.1)},
        {"sampling": Sampling(temperature=0, logit_bias={3: 1.0})},
        {"sampling": Sampling(temperature=0, presence_penalty=0.1)},
        {"logprobs": 0},
        {"min_tokens": 1},
    ],
    ids=str,
)
def test_who_asks_for_more_than_the_likeliest_is_not_greedy(details: dict[str, Any]):
    assert not is_greedy(Sequence(GenerationRequest(0, (0,), 5, **{"sampling": Sampling(temperature=0), **details})))


# Each parameter's ends.


@pytest.mark.parametrize(
    "narrowing",
    [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-46}, {"min_p": 1.0}, {"temperature": 1e-4}, {"temperature": 5e-324}],
    ids=str,
)
def test_the_narrowest_choice_is_the_likeliest(narrowing: dict[str, float]):
    logits, of = np.array([-80.0, 3.0, 90.0, 89.0, -INF]), sequence(Sampling(**narrowing))  # type: ignore[arg-type]
    assert set(drawn_at([0.0, 0.5, LARGEST_BELOW_1], [(logits, of)])[0]) == {2}


@pytest.mark.parametrize("temperature", [1e-9, 1e-38, 5e-324])
def test_the_smallest_temperatures_tell_the_nearest_scores_apart(temperature: float):
    rows = [(np.array([0.0, 1e-6, -INF]), sequence(Sampling(temperature=temperature, **cut))) for cut in ({}, {"top_k": 3})]
    assert (drawn_at([0.0, 0.5, LARGEST_BELOW_1], rows) == 1).all()


@pytest.mark.parametrize("neutral", [{}, {"top_k": VOCABULARY}, {"min_p": 1e-30}, {"top_p": 1.0}], ids=str)
@CALM
@given(logits=LOGITS)
def test_neutral_values_change_nothing(neutral: dict[str, float], logits: np.ndarray):
    of = sequence(Sampling(**neutral), [1, 2], [2, 3], min_tokens=5)  # type: ignore[arg-type]
    assert_drawn_by([softmax(logits)], [(logits, of)])


def test_of_equal_scores_temperature_0_takes_the_first():
    greedy = sequence(Sampling(temperature=0))
    rows = [(np.array(logits), greedy) for logits in ([1.0, 5, 5, 0], [2.0, 2, 2, 2], [-INF, 0, 0, 0])]
    assert [one.token_id for one in sampled(rows)] == [1, 0, 1]


def test_a_bias_of_plus_or_minus_100_forces_or_forbids_a_token():
    logits = np.linspace(0, 5, VOCABULARY)
    biases = ({3: 100.0}, {VOCABULARY - 1: -100.0})
    rows = [(logits, sequence(Sampling(logit_bias=bias))) for bias in biases]
    forced, forbidden = drawn_at([(i + 0.5) / 50 for i in range(50)], rows)
    assert set(forced) == {3}
    assert VOCABULARY - 1 not in forbidden


@pytest.mark.parametrize(
    ("sampling", "prompt", "made", "score"),
    [
        (Sampling(repetition_penalty=2.0), [0], [], 4.0),
        (Sampling(repetition_penalty=2.0), [1], [0], 4.0),
        (Sampling(repetition_penalty=2.0), [0], [0, 0], 4.0),
        (Sampling(repetition_penalty=2.0, logit_bias={0: 2.0}), [0], [], 5.0),  # not 6: the bias comes first
        (Sampling(repetition_penalty=2.0, logit_bias={0: -9.0}), [0], [], -2.0),  # less than 0 then, so it is multiplied
        (Sampling(presence_penalty=2.0, frequency_penalty=1.0), [0, 0], [], 8.0),  # the prompt does not count
        (Sampling(presence_penalty=2.0, frequency_penalty=1.0), [1], [0, 2, 0], 4.0),
        (Sampling(presence_penalty=-2.0, frequency_penalty=0.5), [0], [0], 9.5),
        (Sampling(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 2.0}), [0], [0], 4.0),
    ],
)
def test_a_penalised_token_has_the_score(sampling: Sampling, prompt: list[int], made: list[int], score: float):
    rows = [
        (np.array([8.0, -INF, -INF, other]), sequence(replace(sampling, temperature=0.0), prompt, made))
        for other in (score - 0.01, score + 0.01)
    ]
    assert [one.token_id for one in sampled(rows)] == [0, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_held_off_until_min_tokens_exist(temperature: float):
    logits, numbers = np.array([9.0, 8.0] + [0.0] * 6), [i / 40 for i in range(40)]
    ends = {"min_tokens": 3, "end_token_ids": frozenset({0, 1})}
    rows = [(logits, sequence(Sampling(temperature), [5], [2] * made, **ends)) for made in (0, 2, 3, 4)]
    assert [{0, 1}.isdisjoint(drawn) for drawn in drawn_at(numbers, rows)] == [True, True, False, False]


def test_rows_that_need_more_tokens_than_are_sorted_at_first_stand_beside_rows_that_do_not():
    falling = np.linspace(9, 0, 2000)
    shares, total = softmax(falling), softmax(falling).cumsum()
    cuts, rows, expected = [], [], []
    for kept in (5, sampler.CANDIDATES - 1, sampler.CANDIDATES, sampler.CANDIDATES + 1, 1000, 2000):
        # Each parameter so that it keeps just as many, with its threshold halfway to the next.
        cuts.append({"top_k": kept})
        cuts.append({"top_p": min(1.0, total[kept - 1] - shares[kept - 1] / 2)})
        cuts.append({"min_p": shares[kept - 1] / shares[0] * 0.999})
        cuts.append({"top_k": 1999, **cuts[-1]})
        order = np.random.default_rng(kept).permutation(2000)
        rows += [(falling[order], sequence(Sampling(**cut))) for cut in cuts[-4:]]
        expected += [np.where(order < kept, shares[order], 0) / total[kept - 1]] * 4
        expected[-1] = np.where(order < min(kept, 1999), shares[order], 0) / total[min(kept, 1999) - 1]
    assert_drawn_by(expected, rows)
    last = drawn_at([LARGEST_BELOW_1], rows)[:, 0]
    assert [wanted[one] for wanted, one in zip(expected, last, strict=True)] == [
        wanted[wanted > 0].min() for wanted in expected
    ]


# What the logits may be.


@pytest.mark.parametrize("of", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2, "repetition_penalty": 2.0}], ids=str)
@pytest.mark.parametrize("row", [[NAN] * 4, [0.0, NAN, 2.0, 1.0], [-INF] * 4, [0.0, INF, 2.0, 1.0], [INF] * 4], ids=str)
def test_a_row_that_is_no_numbers_gives_no_token_and_leaves_its_neighbours_alone(row: list[float], of: dict[str, float]):
    # Nor does holding off the one token that is no number make the row a good one.
    options = {"logprobs": 2, "end_token_ids": frozenset({1}), "min_tokens": 1}
    owner, healthy = sequence(Sampling(**of), **options), np.array([0.5, 1.0, 3.0, -INF])  # type: ignore[arg-type]
    rows = [(logits, owner) for logits in (healthy, np.array(row), healthy)]
    first, broken, last = sampled(rows)
    assert broken == Sampled(None)
    assert first == last == sampled(rows[:1])[0]
    assert first.token_id in (0, 2)


@pytest.mark.parametrize("of", [{"temperature": 0.0}, {}, {"top_p": 0.5}], ids=str)
def test_a_row_with_nothing_left_but_end_tokens_that_are_held_off_gives_no_token(of: dict[str, float]):
    ends = {"end_token_ids": frozenset({0, 2}), "min_tokens": 1}
    rows = [(np.array([0.0, -INF, 1.0]), sequence(Sampling(**of), made=made, **ends)) for made in ([], [1])]  # type: ignore[arg-type]
    held, free = sampled(rows)
    assert held == Sampled(None)
    assert free.token_id in (0, 2)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.999}, {"temperature": 4.0}], ids=str)
def test_what_the_model_rules_out_is_never_drawn(cut: dict[str, float]):
    logits = np.array([-INF, 0.0, -INF, 0.1, -INF])
    drawn = drawn_at([0.0, 0.3, 0.9, LARGEST_BELOW_1], [(logits, sequence(Sampling(**cut)))])  # type: ignore[arg-type]
    assert set(drawn[0]) == {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_type_are_drawn_from_and_left_as_they_were(dtype: torch.dtype):
    logits = torch.tensor([[0.0, 4.0, 1.0, -3.0]] * 3, dtype=dtype)
    before = logits.clone()
    greedy = sequence(Sampling(temperature=0, logit_bias={0: 9.0}, repetition_penalty=2.0), [1], [1], logprobs=1)
    held = sequence(Sampling(top_p=0.1), end_token_ids=frozenset({1}), min_tokens=1)
    assert [one.token_id for one in sample(logits, [greedy, held, sequence(Sampling(top_k=1, min_p=0.5))]).read()] == [
        0,
        2,
        1,
    ]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@CALM
@given(batch=BATCHES)
def test_half_precision_is_drawn_from_as_the_numbers_it_stands_for(dtype: torch.dtype, batch: list[Row]):
    half = tensor(batch, dtype)
    assert sample(half, [of for _, of in batch]).read() == sample(half.double(), [of for _, of in batch]).read()


def test_a_flat_row_as_wide_as_a_real_vocabulary_is_drawn_from_whole():
    rows = [(np.zeros(49152), sequence(Sampling()))]
    drawn = drawn_at([(i + 0.5) / 97 for i in range(97)] + [LARGEST_BELOW_1], rows)
    assert len(set(drawn[0])) == 98


@pytest.mark.parametrize("cut", [{}, {"top_k": 4}], ids=str)
def test_a_tokens_share_has_its_lower_border_and_not_its_upper_one(cut: dict[str, int]):
    borders = [0.0, 0.25, 0.5, 0.75]
    rows = [(np.zeros(4), sequence(Sampling(**cut)))]  # type: ignore[arg-type]
    drawn = drawn_at([*borders, *(u + 0.2 for u in borders)], rows)[0].tolist()
    assert sorted(drawn[:4]) == [0, 1, 2, 3]
    assert drawn[:4] == drawn[4:]


# Log probabilities.


@CALM
@given(batch=BATCHES)
def test_log_probabilities_are_the_models_own_before_all_sampling(batch: list[Row]):
    for (logits, of), one in zip(batch, sampled(batch), strict=True):
        count, expected = of.request.logprobs, np.log(softmax(logits))
        if count is None:
            assert one.alternatives == ()
            continue
        chosen, *others = one.alternatives
        assert chosen.token_id == one.token_id
        assert [other.token_id for other in others] == np.argsort(-logits)[:count].tolist()
        for token_id, logprob in one.alternatives:
            assert type(token_id) is int
            assert logprob <= 0
            assert logprob == pytest.approx(expected[token_id], abs=1e-5)


def test_the_log_probability_of_what_can_never_come_is_a_number_too():
    logits, of = np.array([0.0, -INF, -5e4]), sequence(Sampling(temperature=0), logprobs=3)
    [(_, (chosen, likeliest, *never))] = sampled([(logits, of)])
    assert chosen == likeliest == Alternative(0, 0.0)
    assert sorted(never) == [Alternative(1, -9999.0), Alternative(2, -9999.0)]


def test_of_more_alternatives_than_there_are_tokens_all_are_told():
    [(_, alternatives)] = sampled([(np.array([0.0, 2.0, 1.0]), sequence(Sampling(temperature=0), logprobs=20))])
    assert [token_id for token_id, _ in alternatives] == [1, 1, 2, 0]


def test_a_wide_row_of_half_precision_has_log_probabilities_to_five_places():
    logits = torch.randn(3, 49152, generator=torch.Generator().manual_seed(3)).mul(4).bfloat16()
    expected = logits.double().log_softmax(-1)
    for row, one in zip(
        expected, sample(logits, [sequence(Sampling(seed=i), logprobs=20) for i in range(3)]).read(), strict=True
    ):
        assert len(one.alternatives) == 21
        assert all(logprob == pytest.approx(float(row[token_id]), abs=1e-5) for token_id, logprob in one.alternatives)
        assert [a.logprob for a in one.alternatives[1:]] == pytest.approx(row.topk(20).values.tolist(), abs=1e-5)


# Randomness.


@CALM
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_the_random_number_lies_in_0_to_1_and_is_the_same_again(seed: int, position: int):
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


@pytest.mark.parametrize(("digest", "number"), [(b"\x00" * 8, 0.0), (b"\xff" * 8, LARGEST_BELOW_1)])
def test_the_random_number_never_reaches_1(digest: bytes, number: float):
    with mock.patch.object(sampler.hashlib, "blake2b", **{"return_value.digest.return_value": digest}):
        assert uniform(1, 1) == number


def test_the_random_number_differs_with_the_seed_and_with_the_position():
    pairs = [(seed, position) for seed in range(40) for position in range(40)]
    assert len({uniform(*pair) for pair in pairs}) == len(pairs)
    assert uniform(1, 23) != uniform(12, 3)


@CALM
@given(LOGITS, st.integers(0, 2**63 - 1), SEQUENCES)
def test_the_draw_depends_on_the_seed_and_the_position_alone(logits: np.ndarray, seed: int, of: Sequence):
    like = sequence(Sampling(seed=seed), [0], of.completion_ids)
    other = sequence(Sampling(seed=seed), [7] * 9, [3] * of.completion_tokens)
    drawn = sampled([(logits, like)])
    torch.rand(3)
    assert sampled([(logits, sequence(Sampling(seed=seed + 1))), (logits, other)])[1:] == drawn


def test_the_same_seed_gives_the_same_tokens_whoever_runs_beside():
    steps = torch.randn(30, 1, 100, generator=torch.Generator().manual_seed(1))

    def text(seed: int, neighbours: int) -> list[int]:
        of = sequence(Sampling(seed=seed, temperature=1.5, top_p=0.95, frequency_penalty=0.5))
        for step, logits in enumerate(steps):
            others = [sequence(Sampling(seed=i, top_k=i), made=[1] * step) for i in range(neighbours)]
            *_, mine = sample(logits.expand(neighbours + 1, -1), [*others, of]).read()
            of.token_ids.append(mine.token_id)
        return of.completion_ids

    assert text(5, 0) == text(5, 0) == text(5, 7)
    assert len({tuple(text(seed, 0)) for seed in range(5)}) == 5


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


PROBABILITIES = np.array([0.35, 0.25, 0.15, 0.1, 0.07, 0.04, 0.03, 0.01])
# The value that chi-square with 7 and with 9 degrees of freedom passes once in a thousand times.
CHI_SQUARE_7, CHI_SQUARE_9 = 24.32, 27.88


@pytest.mark.parametrize("cut", [{}, {"top_k": 8}], ids=str)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_the_draws_frequencies_fit_the_probabilities(over: str, cut: dict[str, int]):
    draws, logits = 4000, np.log(PROBABILITIES)
    made = [[0] * (i if over == "positions" else 0) for i in range(draws)]
    rows = [(logits, sequence(Sampling(seed=i if over == "seeds" else 5, **cut), made=made[i])) for i in range(draws)]  # type: ignore[arg-type]
    counts = np.bincount([one.token_id for one in sampled(rows)], minlength=len(PROBABILITIES))  # type: ignore[misc]
    assert chi_square(counts, draws * PROBABILITIES) < CHI_SQUARE_7


@pytest.mark.parametrize("seeds", [1, 0], ids=["neighbouring positions", "neighbouring seeds"])
def test_neighbouring_random_numbers_know_nothing_of_each_other(seeds: int):
    table = np.zeros((4, 4))
    for i in range(4000):
        neighbour = uniform(7, i + 1) if seeds else uniform(i + 1, 7)
        table[int(4 * (uniform(7, i) if seeds else uniform(i, 7))), int(4 * neighbour)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert chi_square(table, expected) < CHI_SQUARE_9
