"""Rows of logits to tokens: every row by its own request's parameters and randomness, all rows at once. Knows no model.

The order is: logit bias and penalties, end tokens held off, temperature, top_k, top_p, min_p, then the draw by inverse CDF.
A row's result depends on its own logits, parameters, seed and position alone.
"""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from LLM.engine import flat_draw
from LLM.engine.request import Alternative, Sampled, Sampling
from LLM.engine.sequence import Sequence, TokenCounts

# Sorting a whole vocabulary costs as much as a small model's step. What top_k, top_p and min_p leave is mostly among this
# many likeliest tokens; where it is not, it is looked for among so many times more, and so on.
CANDIDATES = 256
MORE = 16
PIECES = 64  # of a vocabulary, in whose every one the likeliest token is looked for
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny  # what is smaller may be 0 to a division


NOTHING = TokenCounts()  # in the place of the counts of a row without penalties, which are not kept up
NONE = torch.empty(0, 0, dtype=torch.float32)  # log probabilities that nobody asked for
UNUSABLE = -1  # in the place of a token where the logits are no numbers


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens drawn from some rows, and what is to be told of their log probabilities: tensors, wherever they are.

    `tokens` are [rows]. Of the `told` rows, [told rows, alternatives] are `ids` and `logprobs`, each row's own token first.
    """

    tokens: Tensor
    wanted: list[int | None]
    told: list[int]
    ids: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> "Drawn":
        """Give tokens of whose log probabilities nothing is to be told."""
        return cls(tokens, [None] * len(tokens), [], NONE, NONE)

    def to_host(self) -> "Drawn":
        """Copy to the host without waiting for it."""
        host = [tensor.to("cpu", non_blocking=True) for tensor in (self.tokens, self.ids, self.logprobs)]
        return Drawn(host[0], self.wanted, self.told, host[1], host[2])

    def read(self) -> list[Sampled]:
        """Give the results; a row that failed has no token."""
        alternatives: dict[int, tuple[Alternative, ...]] = {}
        for row, ids, logprobs in zip(self.told, self.ids.tolist(), self.logprobs.tolist(), strict=True):
            count = 1 + (self.wanted[row] or 0)
            alternatives[row] = tuple(map(Alternative, ids[:count], logprobs[:count]))
        return [
            Sampled(None) if token_id == UNUSABLE else Sampled(token_id, alternatives.get(row, ()))
            for row, token_id in enumerate(self.tokens.tolist())
        ]


def sample(logits: Tensor, sequences: list[Sequence]) -> Drawn:
    """Draw the next token of each sequence from its row of `logits`, [rows, vocabulary] raw scores of any float type."""
    raw = logits.float()
    scores = _edited(raw, sequences)
    best, tokens = scores.max(-1)
    drawn = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(scores[drawn], [sequences[i] for i in drawn])
    wanted = [s.request.logprobs for s in sequences]
    told = [row for row, count in enumerate(wanted) if count is not None]
    ids = logprobs = NONE
    if told:
        ids, logprobs = _logprobs(raw[told], tokens[told], max(wanted[row] or 0 for row in told))
    # A row that holds a NaN or plus infinity, or whose every token is ruled out, has no finite maximum; it fails alone.
    usable = best.isfinite() if scores is raw else raw.amax(-1).isfinite() & best.isfinite()
    return Drawn(tokens.where(usable, UNUSABLE), wanted, told, ids, logprobs)


def likeliest(logits: Tensor) -> Tensor:
    """Give what `sample` gives where every row `is_greedy`, [rows]."""
    # In pieces first: few rows are too few for a GPU to look through them at once.
    rows, size = logits.shape
    pieces = PIECES if size % PIECES == 0 else 1
    best_of_each, places = logits.reshape(rows, pieces, -1).max(-1)
    best, piece = best_of_each.max(-1)
    tokens: Tensor = piece * (size // pieces) + places.gather(-1, piece[:, None])[:, 0]
    return tokens.where(best.isfinite(), UNUSABLE)


def is_greedy(sequence: Sequence) -> bool:
    """Whether its next token is the likeliest as the model has it, and nothing else is asked for."""
    request = sequence.request
    return request.sampling.temperature == 0 and request.logprobs is None and not _is_edited(sequence)


def uniform(seed: int, position: int) -> float:
    """Give a number in [0, 1) that depends on (seed, position) alone: no neighbour in a batch can change a text."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def _draw(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """Draw one token from each row of edited scores."""
    settings = [s.request.sampling for s in sequences]
    # From the largest down, so that no temperature, however small, makes a number too large.
    scores = scores - scores.amax(-1, keepdim=True)
    scores /= _column([max(s.temperature, SMALLEST_TEMPERATURE) for s in settings], scores, torch.float32)
    u = _column([uniform(s.request.sampling.seed, s.completion_tokens) for s in sequences], scores, torch.float32)
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
    if short and scores.device.type == "cpu":
        drawn = [flat_draw.draw(scores[i], settings[i], float(u[i])) for i in short]
        tokens[short] = torch.tensor(drawn, dtype=torch.long)
    elif short and count < scores.shape[-1]:
        tokens[short] = _draw_from_the_likeliest(scores[short], [settings[i] for i in short], u[short], MORE * count)
    return tokens


def _kept(top: Tensor, total: Tensor, settings: list[Sampling]) -> tuple[Tensor, Tensor]:
    """Cut sorted scores by top_k, top_p and min_p.

    Gives the probabilities, 0 where cut and not adding up to 1, and per row whether they are enough: the rest of the
    vocabulary, whose exponentiated scores add up with these to the exponential of `total`, could not change them.
    """
    width = top.shape[-1]
    unlimited = _column([s.top_k == 0 for s in settings], top, torch.bool)
    places = torch.arange(width, dtype=torch.long, device=top.device)
    in_k = unlimited | (places < _column([s.top_k for s in settings], top, torch.long))
    # Of what top_k leaves, the probabilities are those of the softmax over it.
    of_k = top.masked_fill(~in_k, -torch.inf).logsumexp(-1, keepdim=True)
    probabilities = (top - torch.where(unlimited, total, of_k)).exp() * in_k
    # A token stays while those before it hold less than top_p.
    keep = probabilities.cumsum(-1) - probabilities < _column([s.top_p for s in settings], top, torch.float32)
    keep &= probabilities >= _column([s.min_p for s in settings], top, torch.float32) * probabilities[:, :1]
    keep[:, 0] = True  # the likeliest always stays, whatever rounding says
    cut_by_k = _column([0 < s.top_k <= width for s in settings], top, torch.bool)
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
    if not any(_is_edited(sequence) for sequence in sequences):
        return raw
    scores = raw.clone()
    settings = [s.request.sampling for s in sequences]
    if any(s.logit_bias for s in settings):
        rows, ids = _places((s.logit_bias for s in settings), scores)
        scores[rows, ids] += _tensor([b for s in settings for b in s.logit_bias.values()], scores, torch.float32)
    _penalise_repetition(scores, sequences)
    _penalise_counts(scores, sequences)
    held = [() if s.completion_tokens >= s.request.min_tokens else s.request.end_token_ids for s in sequences]
    if any(held):
        scores[_places(held, scores)] = -torch.inf
    return scores


def _is_edited(sequence: Sequence) -> bool:
    held = sequence.completion_tokens < sequence.request.min_tokens
    return held or sequence.needs_its_tokens or bool(sequence.request.sampling.logit_bias)


def _penalise_repetition(scores: Tensor, sequences: list[Sequence]) -> None:
    # CTRL's penalty, over the prompt too: https://arxiv.org/abs/1909.05858
    penalties = [s.request.sampling.repetition_penalty for s in sequences]
    if all(penalty == 1 for penalty in penalties):
        return
    none = array("q")
    rows, ids = _places([none if p == 1 else s.counts().seen for s, p in zip(sequences, penalties, strict=True)], scores)
    penalty, seen = _tensor(penalties, scores, torch.float32)[rows], scores[rows, ids]
    scores[rows, ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _penalise_counts(scores: Tensor, sequences: list[Sequence]) -> None:
    # OpenAI's penalties, over the completion alone: https://platform.openai.com/docs/guides/text-generation
    penalties = [(s.request.sampling.presence_penalty, s.request.sampling.frequency_penalty) for s in sequences]
    if not any(presence or frequency for presence, frequency in penalties):
        return
    counts = [s.counts() if any(own) else NOTHING for s, own in zip(sequences, penalties, strict=True)]
    rows, ids = _places([c.made for c in counts], scores)
    presence, frequency = _tensor(penalties, scores, torch.float32)[rows].unbind(-1)
    scores[rows, ids] -= presence + frequency * _joined([c.times for c in counts]).to(scores.device)


def _places(ids: Iterable[Iterable[int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Give (rows, columns) of the ids listed for each row; within a row none twice, so that they can be written to."""
    arrays = [some if isinstance(some, array) else array("q", some) for some in ids]
    counts = torch.tensor([len(some) for some in arrays], dtype=torch.long)
    rows = torch.arange(len(arrays), dtype=torch.long).repeat_interleave(counts)
    return rows.to(like.device), _joined(arrays).to(like.device)


def _joined(arrays: "list[array[int]]") -> Tensor:
    # Memory is copied, not numbers one by one: a long conversation's ids are many, and this happens for every token.
    return torch.cat(
        [torch.frombuffer(some, dtype=torch.long) if some else torch.empty(0, dtype=torch.long) for some in arrays]
    )


def _logprobs(raw: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Give ids and log probabilities [rows, 1 + count] of each row's token and its likeliest, as the model has them."""
    # JSON knows no infinity; what can never come is told as OpenAI tells it.
    logprobs = raw.log_softmax(-1).clamp(min=-9999.0)
    # Always looked for among as many: which of equally likely ones come first must not hang on how many a neighbour wants.
    top, ids = (best[:, :count] for best in logprobs.topk(min(CANDIDATES, logprobs.shape[-1])))
    own = tokens[:, None]
    return torch.cat([own, ids], -1), torch.cat([logprobs.gather(-1, own), top], -1)


def _column(values: list[float] | list[int] | list[bool], like: Tensor, dtype: torch.dtype) -> Tensor:
    return _tensor(values, like, dtype)[:, None]


def _tensor(values: object, like: Tensor, dtype: torch.dtype) -> Tensor:
    # torch's default dtype is the process's, and changes while another model is loaded.
    return torch.tensor(values, dtype=dtype, device=like.device)
