"""Rows of logits to tokens: every row by its own request's parameters and randomness, all rows at once. Knows no model.

The order is: logit bias and penalties, end tokens held off, temperature, top_k, top_p, min_p, then the draw by inverse CDF.
A row's result depends on its own logits, parameters, seed and position alone.
"""

import hashlib
from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from LLM.engine.request import Alternative, Sampled, Sampling
from LLM.engine.sequence import Sequence

# Sorting a whole vocabulary costs as much as a small model's step. What top_k, top_p and min_p leave is mostly among this
# many likeliest tokens; where it is not, it is looked for among so many times more, and so on.
CANDIDATES = 256
MORE = 16
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny  # what is smaller may be 0 to a division


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """Draw the next token of each sequence from its row of `logits`, [rows, vocabulary] raw scores of any float type."""
    raw = logits.float()
    scores = _edited(raw, sequences)
    best, tokens = scores.max(-1)
    # A row that holds a NaN or plus infinity, or whose every token is ruled out, has no finite maximum; it fails alone.
    usable = (raw.amax(-1).isfinite() & best.isfinite()).tolist()
    drawn = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0 and usable[i]]
    if drawn:
        tokens[drawn] = _draw(scores[drawn], [sequences[i] for i in drawn])
    alternatives = _logprobs(raw, tokens, [s.request.logprobs for s in sequences])
    return [
        Sampled(token_id, told) if ok else Sampled(None)
        for token_id, ok, told in zip(tokens.tolist(), usable, alternatives, strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """Give a number in [0, 1) that depends on (seed, position) alone: no neighbour in a batch can change a text."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def _draw(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """Draw one token from each row of edited scores."""
    settings = [s.request.sampling for s in sequences]
    # From the largest down, so that no temperature, however small, makes a number too large.
    scores = scores - scores.amax(-1, keepdim=True)
    scores /= _column([max(s.temperature, SMALLEST_TEMPERATURE) for s in settings], scores)
    u = _column([uniform(s.request.sampling.seed, s.completion_tokens) for s in sequences], scores)
    tokens = torch.empty(len(sequences), dtype=torch.long, device=scores.device)
    # Nothing to leave out: no order is needed, the ids' own will do.
    plain = [i for i, s in enumerate(settings) if s.top_k == 0 and s.top_p == 1 and s.min_p == 0]
    if plain:
        tokens[plain] = _pick(scores[plain].softmax(-1), u[plain])
    if cut := sorted(set(range(len(settings))).difference(plain)):
        tokens[cut] = _draw_from_the_likeliest(scores[cut], [settings[i] for i in cut], u[cut], CANDIDATES)
    return tokens


def _draw_from_the_likeliest(scores: Tensor, settings: list[Sampling], u: Tensor, count: int) -> Tensor:
    """Draw from each row's `count` likeliest tokens, or from more where those are not enough."""
    top, ids = scores.topk(min(count, scores.shape[-1]))
    probabilities, enough = _kept(top, scores.logsumexp(-1, keepdim=True), settings)
    tokens = ids.gather(-1, _pick(probabilities, u)[:, None])[:, 0]
    short = [i for i, is_enough in enumerate(enough.tolist()) if not is_enough]
    if short and count < scores.shape[-1]:
        tokens[short] = _draw_from_the_likeliest(scores[short], [settings[i] for i in short], u[short], MORE * count)
    return tokens


def _kept(top: Tensor, total: Tensor, settings: list[Sampling]) -> tuple[Tensor, Tensor]:
    """Cut sorted scores by top_k, top_p and min_p.

    Gives the probabilities, 0 where cut and not adding up to 1, and per row whether they are enough: the rest of the
    vocabulary, whose exponentiated scores add up with these to the exponential of `total`, could not change them.
    """
    width = top.shape[-1]
    unlimited = _column([s.top_k == 0 for s in settings], top)
    in_k = unlimited | (torch.arange(width, device=top.device) < _column([s.top_k for s in settings], top))
    # Of what top_k leaves, the probabilities are those of the softmax over it.
    of_k = top.masked_fill(~in_k, -torch.inf).logsumexp(-1, keepdim=True)
    probabilities = (top - torch.where(unlimited, total, of_k)).exp() * in_k
    # A token stays while those before it hold less than top_p.
    keep = probabilities.cumsum(-1) - probabilities < _column([s.top_p for s in settings], top)
    keep &= probabilities >= _column([s.min_p for s in settings], top) * probabilities[:, :1]
    keep[:, 0] = True  # the likeliest always stays, whatever rounding says
    cut_by_k = _column([0 < s.top_k <= width for s in settings], top)
    cut_by_share = unlimited & ~keep[:, -1:]
    return probabilities * keep, (cut_by_k | cut_by_share)[:, 0]


def _pick(probabilities: Tensor, u: Tensor) -> Tensor:
    """Give the first place in each row where the running sum passes its share `u` of the whole."""
    cumulative = probabilities.cumsum(-1)
    places = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
    # Rounding may point past the last place that holds anything: the first to reach the whole sum.
    return torch.minimum(places, cumulative.argmax(-1))


def _edited(raw: Tensor, sequences: list[Sequence]) -> Tensor:
    """Apply logit bias, penalties and held-off end tokens, touching only the scores that change."""
    scores = raw.clone()
    settings = [s.request.sampling for s in sequences]
    if any(s.logit_bias for s in settings):
        rows, ids = _places((s.logit_bias for s in settings), scores)
        scores[rows, ids] += torch.tensor([b for s in settings for b in s.logit_bias.values()], device=scores.device)
    _penalise_repetition(scores, sequences)
    _penalise_counts(scores, sequences)
    held = [() if s.completion_tokens >= s.request.min_tokens else s.request.end_token_ids for s in sequences]
    if any(held):
        scores[_places(held, scores)] = -torch.inf
    return scores


def _penalise_repetition(scores: Tensor, sequences: list[Sequence]) -> None:
    # CTRL's penalty, over the prompt too: https://arxiv.org/abs/1909.05858
    penalties = [s.request.sampling.repetition_penalty for s in sequences]
    if all(penalty == 1 for penalty in penalties):
        return
    none = array("q")
    rows, ids = _places([none if p == 1 else s.counts().seen for s, p in zip(sequences, penalties, strict=True)], scores)
    penalty, seen = torch.tensor(penalties, device=scores.device)[rows], scores[rows, ids]
    scores[rows, ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _penalise_counts(scores: Tensor, sequences: list[Sequence]) -> None:
    # OpenAI's penalties, over the completion alone: https://platform.openai.com/docs/guides/text-generation
    penalties = [(s.request.sampling.presence_penalty, s.request.sampling.frequency_penalty) for s in sequences]
    if not any(presence or frequency for presence, frequency in penalties):
        return
    counts = [s.counts() for s in sequences]
    rows, ids = _places([c.made for c in counts], scores)
    presence, frequency = torch.tensor(penalties, device=scores.device)[rows].unbind(-1)
    scores[rows, ids] -= presence + frequency * _joined([c.times for c in counts]).to(scores.device)


def _places(ids: Iterable[Iterable[int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Give (rows, columns) of the ids listed for each row; within a row none twice, so that they can be written to."""
    arrays = [some if isinstance(some, array) else array("q", some) for some in ids]
    rows = torch.arange(len(arrays)).repeat_interleave(torch.tensor([len(some) for some in arrays]))
    return rows.to(like.device), _joined(arrays).to(like.device)


def _joined(arrays: "list[array[int]]") -> Tensor:
    # Memory is copied, not numbers one by one: a long conversation's ids are many, and this happens for every token.
    return torch.cat(
        [torch.frombuffer(some, dtype=torch.long) if some else torch.empty(0, dtype=torch.long) for some in arrays]
    )


def _logprobs(raw: Tensor, tokens: Tensor, wanted: list[int | None]) -> list[tuple[Alternative, ...]]:
    """Give for each row that wants them the drawn token and the likeliest ones, by the model's own distribution."""
    told: list[tuple[Alternative, ...]] = [()] * len(wanted)
    rows = [i for i, count in enumerate(wanted) if count is not None]
    if not rows:
        return told
    # JSON knows no infinity; what can never come is told as OpenAI tells it.
    logprobs = raw[rows].log_softmax(-1).clamp(min=-9999.0)
    chosen = tokens[rows]
    own = logprobs.gather(-1, chosen[:, None])[:, 0]
    # Always looked for among as many: which of equally likely ones come first must not hang on how many a neighbour wants.
    most = max(wanted[row] or 0 for row in rows)
    top, ids = (best[:, :most] for best in logprobs.topk(min(CANDIDATES, logprobs.shape[-1])))
    for row, *first, likeliest, scores in zip(rows, chosen.tolist(), own.tolist(), ids.tolist(), top.tolist(), strict=True):
        alternatives = [Alternative(*pair) for pair in zip(likeliest, scores, strict=True)]
        told[row] = (Alternative(*first), *alternatives[: wanted[row]])
    return told


def _column(values: list[float] | list[int] | list[bool], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]
