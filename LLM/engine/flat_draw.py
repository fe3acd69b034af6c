"""A draw from a flat distribution: what `sampler` draws from a sorted row, without sorting the row. CPU only.

Where top_k, top_p and min_p leave most of a vocabulary, sorting takes 5 ms a row of 49,152 tokens, and every next token
waits for that. Only two places in the order matter, that of the cut and that of the draw: counting by the leading bits of
the scores finds the bins they lie in, and a bin has few tokens to sort. Sums are rounded like those of the sorted row.
"""

import torch
from torch import Tensor

from LLM.engine.request import Sampling

SHIFT = 17  # bits of a score's magnitude that a bin leaves out: 64 bins for each power of two
BINS = 1 << (31 - SHIFT)


def draw(scores: Tensor, settings: Sampling, u: float) -> int:
    """Return the token at the share `u` of what is left of one row of `scores`, whose largest is 0."""
    bins = ((0 - scores).view(torch.int32) >> SHIFT).clamp_(min=0)  # the likeliest first; a NaN may be negative
    kept, total = None, scores.logsumexp(-1)
    if 0 < settings.top_k < len(scores):
        kept = _first(bins, scores, settings.top_k)
        total = scores.masked_fill(~kept, -torch.inf).logsumexp(-1)
    shares = (scores - total).exp()
    if kept is not None:
        shares = shares * kept
    if settings.min_p:
        shares = shares * (shares >= settings.min_p * shares.max())
    running = torch.bincount(bins, weights=shares.double(), minlength=BINS).cumsum(0)
    whole = running[-1].float()
    if settings.top_p < 1 and float(whole) >= settings.top_p:
        whole = _cut(bins, scores, shares, running, settings.top_p)
    return _at(bins, scores, shares, running, whole, u)


def _first(bins: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return which are the `count` likeliest."""
    counts = torch.bincount(bins, minlength=BINS).cumsum(0)
    place = int((counts < count).sum())
    ids = _sorted(bins, scores, place)
    first = bins < place
    first[ids[: count - (int(counts[place - 1]) if place else 0)]] = True
    return first


def _cut(bins: Tensor, scores: Tensor, shares: Tensor, running: Tensor, top_p: float) -> Tensor:
    """Return the sum of those that stay: a token stays while those before it hold less than `top_p`."""
    place = min(int((running.float() < top_p).sum()), BINS - 1)
    sums, own = _sums(shares, running, place, _sorted(bins, scores, place))
    return sums[(sums - own < top_p).sum() - 1]


def _at(bins: Tensor, scores: Tensor, shares: Tensor, running: Tensor, whole: Tensor, u: float) -> int:
    """Return the first token whose running sum is over its share `u` of the `whole`, or has reached that."""
    target = whole * torch.tensor(u, dtype=torch.float32)
    place = int(((running.float() <= target) & (running.float() < whole)).sum())
    ids = _sorted(bins, scores, min(place, BINS - 1))
    sums, _ = _sums(shares, running, place, ids)
    within = int(((sums <= target) & (sums < whole)).sum())
    return int(ids[min(within, len(ids) - 1)]) if len(ids) else 0


def _sums(shares: Tensor, running: Tensor, place: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the running sums over the tokens of a bin, and their own shares."""
    own = shares[ids]
    before = running[place - 1] if place else torch.zeros((), dtype=torch.float64)
    return (before + own.double().cumsum(0)).float(), own


def _sorted(bins: Tensor, scores: Tensor, place: int) -> Tensor:
    """Return the ids of a bin, the likeliest first."""
    ids = (bins == place).nonzero()[:, 0]
    return ids[scores[ids].sort(descending=True, stable=True).indices]
