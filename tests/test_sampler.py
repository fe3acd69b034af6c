"""The sampler against the textbook in float64, and against transformers' own processors, by its public border only.

What a row of logits may yield is found out by putting in the random number: at the middle of each candidate's share of
[0, 1) the sampler must draw that candidate.
"""

from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from LLM.engine import sampler
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.sampler import sample, uniform
from LLM.engine.scheduler import Sequence

# Derandomised: where floats meet thresholds, a suite must not fail one day in a hundred.
CALM = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

VOCABULARY = 24
TOKENS = st.integers(0, VOCABULARY - 1)
LOGITS = st.lists(st.integers(-400, 400), min_size=VOCABULARY, max_size=VOCABULARY, unique=True).map(
    lambda row: np.array(row) / 50.0
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.2, 4),
    top_p=st.just(1.0) | st.floats(0.05, 1),
    top_k=st.just(0) | st.integers(1, VOCABULARY + 5),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.3, 3),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    logit_bias=st.dictionaries(TOKENS, st.floats(-5, 5), max_size=3),
)
SEQUENCES = st.tuples(st.lists(TOKENS, min_size=1, max_size=6), st.lists(TOKENS, max_size=6))
LARGEST_BELOW_1 = 1 - 2**-53


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequence(sampling: Sampling, prompt: list[int] = [0], completion: list[int] = [], **request: object) -> Sequence:  # noqa: B006
    made = Sequence(GenerationRequest("k", tuple(prompt), 99, sampling, **request))  # type: ignore[arg-type]
    made.token_ids += completion
    return made


@pytest.mark.parametrize("extreme", [{"temperature": 1e-38}, {"temperature": 5e-324}, {"top_p": 1e-46}, {"min_p": 1.0}])
def test_the_most_extreme_parameters_draw_the_likeliest(extreme: dict[str, float]):
    logits = torch.tensor([-80.0, 3.0, 90.0, 89.0, float("-inf")])
    assert sample(logits, sequence(Sampling(**extreme, seed=7))) == 2  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_raise_nothing():
    for temperature in (0.0, 1.0):
        assert sample(torch.full((8,), float("nan")), sequence(Sampling(temperature=temperature))) in range(8)


def drawn_at(u: float, logits: np.ndarray, of: Sequence) -> int:
    with mock.patch.object(sampler, "uniform", return_value=u):
        return sample(torch.tensor(logits, dtype=torch.float32), of)


def assert_draws(expected: np.ndarray, logits: np.ndarray, of: Sequence) -> None:
    """The candidates lie in [0, 1) by falling probability, each on its own share, and nothing else lies there."""
    order = np.argsort(-expected, kind="stable")
    shares = expected[order]
    middles = shares.cumsum() - shares / 2
    for token_id, share, middle in zip(order, shares, middles, strict=True):
        if share > 1e-4:
            assert drawn_at(float(middle), logits, of) == token_id
    assert expected[drawn_at(0.0, logits, of)] == shares[0]
    assert expected[drawn_at(LARGEST_BELOW_1, logits, of)] > 0


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
    return scores


def textbook(logits: np.ndarray, of: Sequence) -> np.ndarray:
    """The probabilities by definition; gives up on rows where a threshold is so near that float32 may see it otherwise."""
    sampling, scores = of.request.sampling, textbook_scores(logits, of) / of.request.sampling.temperature
    assume(np.diff(np.sort(scores)).min() > 1e-4)
    order = np.argsort(-scores)[: sampling.top_k or None]
    shares = softmax(scores[order])
    before, floor = shares.cumsum() - shares, sampling.min_p * shares[0]
    assume(sampling.top_p == 1 or np.abs(before - sampling.top_p).min() > 1e-5)
    assume((np.abs(shares[1:] - floor) > 1e-4 * floor).all())
    kept = ((before < sampling.top_p) | (sampling.top_p == 1)) & (shares >= floor * (1 - 1e-9))
    result = np.zeros_like(scores)
    result[order[kept]] = shares[kept] / shares[kept].sum()
    return result


def by_transformers(logits: np.ndarray, of: Sequence) -> np.ndarray:
    """The probabilities that `generate` would draw from."""
    s = of.request.sampling
    processors = LogitsProcessorList()
    if s.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in s.logit_bias.items()]))
    processors += [RepetitionPenaltyLogitsProcessor(s.repetition_penalty), TemperatureLogitsWarper(s.temperature)]
    if s.top_k:
        processors.append(TopKLogitsWarper(s.top_k))
    processors += [TopPLogitsWarper(s.top_p), MinPLogitsWarper(s.min_p)]
    scores = processors(torch.tensor([of.token_ids]), torch.tensor(logits[None], dtype=torch.float32))
    return scores[0].double().softmax(0).numpy()


@CALM
@given(LOGITS, SAMPLINGS, SEQUENCES)
def test_the_draw_is_the_textbooks(logits: np.ndarray, sampling: Sampling, ids: tuple[list[int], list[int]]):
    of = sequence(sampling, *ids)
    assert_draws(textbook(logits, of), logits, of)


@CALM
@given(LOGITS, SAMPLINGS, SEQUENCES)
def test_the_draw_is_transformers_own(logits: np.ndarray, sampling: Sampling, ids: tuple[list[int], list[int]]):
    of = sequence(replace(sampling, presence_penalty=0.0, frequency_penalty=0.0), *ids)
    textbook(logits, of)  # leaves out rows where a threshold is too near
    assert_draws(by_transformers(logits, of), logits, of)


@CALM
@given(LOGITS, SAMPLINGS, SEQUENCES)
def test_temperature_0_takes_the_largest_score_whatever_narrows_the_choice(
    logits: np.ndarray, sampling: Sampling, ids: tuple[list[int], list[int]]
):
    of = sequence(replace(sampling, temperature=0.0), *ids)
    scores = textbook_scores(logits, of)
    assume(np.diff(np.sort(scores))[-1] > 1e-4)
    assert {drawn_at(u, logits, of) for u in (0.0, 0.5, LARGEST_BELOW_1)} == {scores.argmax()}


@CALM
@given(LOGITS, SEQUENCES)
def test_neutral_values_change_nothing(logits: np.ndarray, ids: tuple[list[int], list[int]]):
    assert_draws(softmax(logits), logits, sequence(Sampling(), *ids))


@pytest.mark.parametrize("narrowing", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
@CALM
@given(LOGITS)
def test_the_narrowest_choice_is_the_largest_score(narrowing: dict[str, float], logits: np.ndarray):
    assert {drawn_at(u, logits, sequence(Sampling(**narrowing))) for u in (0.0, LARGEST_BELOW_1)} == {logits.argmax()}


def test_a_flat_row_as_wide_as_a_real_vocabulary_is_drawn_from_whole():
    logits, of = np.zeros(49152), sequence(Sampling())
    drawn = {drawn_at((i + 0.5) / 97, logits, of) for i in range(97)}
    assert len(drawn) == 97
    assert drawn_at(LARGEST_BELOW_1, logits, of) not in drawn


def test_a_candidates_share_has_its_lower_border_and_not_its_upper_one():
    logits, of = np.zeros(4), sequence(Sampling())
    drawn = [drawn_at(u, logits, of) for u in (0.0, 0.25, 0.5, 0.75)]
    assert sorted(drawn) == [0, 1, 2, 3]
    assert drawn == [drawn_at(u + 0.2, logits, of) for u in (0.0, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_of_any_float_type_are_drawn_from_and_left_as_they_were(dtype: torch.dtype):
    logits = torch.tensor([0.0, 4.0, 1.0, -3.0], dtype=dtype)
    before = logits.clone()
    of = sequence(Sampling(temperature=0, logit_bias={0: 9.0}, repetition_penalty=2.0), [1], [1])
    assert sample(logits, of) == 0
    assert torch.equal(logits, before)


def test_a_bias_of_plus_or_minus_100_forces_or_forbids_a_token():
    logits = np.linspace(0, 5, VOCABULARY)
    forced, forbidden = sequence(Sampling(logit_bias={3: 100.0})), sequence(Sampling(logit_bias={VOCABULARY - 1: -100.0}))
    grid = np.linspace(0, LARGEST_BELOW_1, 50)
    assert {drawn_at(u, logits, forced) for u in grid} == {3}
    assert VOCABULARY - 1 not in {drawn_at(u, logits, forbidden) for u in grid}


# min_tokens.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("made", "held_off"), [(0, True), (2, True), (3, False), (4, False)])
def test_end_tokens_are_held_off_until_min_tokens_exist(temperature: float, made: int, held_off: bool):
    logits = np.array([9.0, 8.0] + [0.0] * 6)
    of = sequence(Sampling(temperature), [5], [2] * made, min_tokens=3, end_token_ids=frozenset({0, 1}))
    drawn = {drawn_at(u, logits, of) for u in np.linspace(0, LARGEST_BELOW_1, 40)}
    assert drawn.isdisjoint({0, 1}) == held_off


@CALM
@given(LOGITS, st.integers(0, 4))
def test_min_tokens_is_transformers_own(logits: np.ndarray, made: int):
    of = sequence(Sampling(), [5], [2] * made, min_tokens=3, end_token_ids=frozenset({1, 7}))
    at_least = MinLengthLogitsProcessor(1 + 3, [1, 7])
    scores = at_least(torch.tensor([of.token_ids]), torch.tensor(logits[None], dtype=torch.float32))
    assert_draws(scores[0].double().softmax(0).numpy(), logits, of)


def test_min_tokens_without_any_end_token_changes_nothing():
    logits = np.linspace(-2, 2, VOCABULARY)
    assert_draws(softmax(logits), logits, sequence(Sampling(), min_tokens=5))


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
def test_the_draw_depends_on_the_seed_and_the_position_alone(
    logits: np.ndarray, seed: int, ids: tuple[list[int], list[int]]
):
    row, (prompt, completion) = torch.tensor(logits), ids
    drawn = sample(row, sequence(Sampling(seed=seed), prompt, completion))
    other = sequence(Sampling(seed=seed), [7] * 9, [3] * len(completion))
    sample(row, sequence(Sampling(seed=seed + 1)))
    torch.rand(3)
    assert sample(row, other) == drawn


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


PROBABILITIES = np.array([0.35, 0.25, 0.15, 0.1, 0.07, 0.04, 0.03, 0.01])
# The value that chi-square with 7 and with 9 degrees of freedom passes once in a thousand times.
CHI_SQUARE_7, CHI_SQUARE_9 = 24.32, 27.88


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_the_draws_frequencies_fit_the_probabilities(over: str):
    row, draws = torch.tensor(np.log(PROBABILITIES)), 4000
    of = sequence(Sampling(seed=5))
    counts = np.zeros(len(PROBABILITIES))
    for i in range(draws):
        token_id = sample(row, sequence(Sampling(seed=i)) if over == "seeds" else of)
        of.token_ids.append(token_id)
        counts[token_id] += 1
    assert chi_square(counts, draws * PROBABILITIES) < CHI_SQUARE_7


@pytest.mark.parametrize("seeds", [1, 0], ids=["neighbouring positions", "neighbouring seeds"])
def test_neighbouring_random_numbers_know_nothing_of_each_other(seeds: int):
    table = np.zeros((4, 4))
    for i in range(4000):
        neighbour = uniform(7, i + 1) if seeds else uniform(i + 1, 7)
        table[int(4 * (uniform(7, i) if seeds else uniform(i, 7))), int(4 * neighbour)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert chi_square(table, expected) < CHI_SQUARE_9
