"""A draw without sorting gives the token that the sorted row gives, and sorts no vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.engine import flat_draw, sampler
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.sequence import Sequence


def sorted_draw(scores: torch.Tensor, how: Sampling, u: float) -> int:
    top, ids = scores[None].topk(len(scores))
    probabilities, _ = sampler._kept(top, scores.logsumexp(-1, keepdim=True)[None], [how])
    return int(ids[0, sampler._pick(probabilities, torch.tensor([[u]], dtype=torch.float32))[0]])


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 300, 3000]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    ruled_out=st.sampled_from([0.0, 0.3]),
    top_p=st.sampled_from([1.0, 0.0001, 0.5, 0.9999]),
    top_k=st.sampled_from([0, 1, 280, 2900, 10**6]),
    min_p=st.sampled_from([0.0, 1e-9, 0.01, 1.0]),
    u=st.floats(0, 0.999),
)
def test_it_draws_what_is_drawn_from_the_sorted_row(
    seed: int, size: int, spread: float, ruled_out: float, top_p: float, top_k: int, min_p: float, u: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator, dtype=torch.float32) * spread
    scores[torch.rand(size, generator=generator, dtype=torch.float32) < ruled_out] = -torch.inf
    if not scores.isfinite().any():
        scores[0] = 0
    scores -= scores.max()
    how = Sampling(top_p=top_p, top_k=top_k, min_p=min_p)
    assert scores[flat_draw.draw(scores, how, u)] == scores[sorted_draw(scores, how, u)]


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_scores_that_are_no_numbers_give_some_token_and_no_error(value: float) -> None:
    scores = torch.full((500,), value, dtype=torch.float32)
    assert 0 <= flat_draw.draw(scores, Sampling(top_p=0.9, min_p=0.1), 0.5) < 500


@pytest.mark.parametrize("how", [Sampling(top_p=0.9999), Sampling(min_p=1e-9), Sampling(top_k=30_000), Sampling(top_p=0.5)])
def test_no_step_sorts_a_vocabulary_on_a_cpu(monkeypatch: pytest.MonkeyPatch, how: Sampling) -> None:
    sizes: list[int] = []
    topk, sort = torch.Tensor.topk, torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, k, *a, **b: sizes.append(k) or topk(self, k, *a, **b))
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, *a, **b: sizes.append(self.shape[-1]) or sort(self, *a, **b))
    logits = torch.randn(3, 49_152, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    sampler.sample(logits, [Sequence(GenerationRequest(row, (1,), 9, sampling=how)) for row in range(3)])
    assert sizes
    assert max(sizes) <= 5000
