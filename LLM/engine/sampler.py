"""One row of logits to one token id, by the request's own parameters and its own randomness.

The order is: logit bias and penalties, end tokens held off, temperature, top_k, top_p, min_p, then the draw.
"""

import hashlib
from collections import Counter

import torch
from torch import Tensor

from LLM.engine.request import Sampling
from LLM.engine.scheduler import Sequence

SMALLEST_TEMPERATURE = 1e-6  # below this float32 has no other share than 0 and 1 for any logits


def sample(logits: Tensor, sequence: Sequence) -> int:
    """Draw the sequence's next token id from `logits`, a row of [vocabulary] raw scores of any float type."""
    sampling = sequence.request.sampling
    scores = _penalised(logits.float(), sequence)
    if sequence.completion_tokens < sequence.request.min_tokens:
        scores[list(sequence.request.end_token_ids)] = -torch.inf
    if sampling.temperature == 0:
        return int(scores.argmax())
    # From the largest down, so that no temperature, however small, makes a number too large.
    cooled = (scores - scores.max()) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    probabilities, ids = _candidates(cooled, sampling)
    # Inverse CDF: the first candidate at which the running sum passes the random number.
    cumulative = probabilities.cumsum(0)
    u = uniform(sampling.seed, sequence.completion_tokens) * cumulative[-1]
    # Rounding may point past the last candidate that holds anything: the first to reach the whole sum.
    return int(ids[torch.searchsorted(cumulative, u, right=True).clamp(max=cumulative.argmax())])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone, so that no neighbour in a batch can change a text."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def _candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Give the probabilities, largest first, of the ids that top_k, top_p and min_p leave, and those ids."""
    # Only top_k may shrink the sort: top_p and min_p are shares of what it leaves.
    k = min(sampling.top_k or scores.numel(), scores.numel())
    top, ids = scores.topk(k) if k < scores.numel() else scores.sort(descending=True)
    probabilities = top.softmax(0)
    # A token stays while those before it hold less than top_p; the first one always stays.
    keep = probabilities.cumsum(0) - probabilities < sampling.top_p
    keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    return probabilities[keep], ids[keep]


def _penalised(scores: Tensor, sequence: Sequence) -> Tensor:
    sampling = sequence.request.sampling
    scores = scores.clone()
    for token_id, bias in sampling.logit_bias.items():
        scores[token_id] += bias
    if sampling.repetition_penalty != 1:
        # CTRL's penalty, over the prompt too: https://arxiv.org/abs/1909.05858
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=scores.device)
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.completion_ids:
        counts = Counter(sequence.completion_ids)
        times = torch.tensor(list(counts.values()), device=scores.device)
        scores[list(counts)] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return scores
