"""Arithmetic over what clients saw: TTFT, ITL and TPOT, rates, medians and spreads. Pure.

The definitions are those of vLLM's benchmark (https://docs.vllm.ai/en/latest/cli/bench/serve.html). One of them wants a word
here, where a frame may carry several tokens: an ITL sample is the time between two successive arrivals of text, however many
tokens came with the second. So merging frames never makes a stream look smoother, and TPOT, which divides by the tokens that
the server counted, stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Trace:
    """One request as its client saw it: times in seconds of the monotonic clock, tokens as the server counted them."""

    sent: float
    arrivals: tuple[float, ...]  # of text
    ended: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Time to first token: from sending to the first text, or to the end of an answer without any."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the time between each two successive arrivals."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float:
        """Time per output token after the first: from the first text to the last."""
        if self.completion_tokens < 2 or not self.arrivals:
            return 0.0
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)


class Spread(NamedTuple):
    """What several runs measured."""

    median: float
    low: float
    high: float


def quantile(values: Sequence[float], share: float) -> float:
    """Give the value below which a `share` of all lies, linear between neighbours as in vLLM's benchmark.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    return float(np.quantile(values, share))


def spread(values: Sequence[float]) -> Spread:
    """Give the median and the extremes."""
    return Spread(quantile(values, 0.5), min(values), max(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Give the ratio of the medians, and the extremes of the ratios of runs that were made one after the other."""
    pairs = [our / their for our, their in zip(ours, theirs, strict=False)]
    return Spread(quantile(ours, 0.5) / quantile(theirs, 0.5), min(pairs), max(pairs))


def tokens_per_second(traces: Sequence[Trace]) -> float:
    """Give the rate of all requests together, from the first one's sending to the last one's end."""
    seconds = max(t.ended for t in traces) - min(t.sent for t in traces)
    return sum(t.completion_tokens for t in traces) / seconds


def ttft(traces: Sequence[Trace], share: float = 0.5) -> float:
    """Give a quantile of the times to first token, in seconds."""
    return quantile([t.ttft for t in traces], share)


def itl(traces: Sequence[Trace], share: float = 0.5) -> float:
    """Give a quantile of all inter-token latencies, in seconds."""
    return quantile([gap for t in traces for gap in t.itls], share)


def steady_itls(traces: Sequence[Trace]) -> list[float]:
    """Give the inter-token latencies from when every request had its first token until the first one had its last."""
    begin = max(t.arrivals[0] for t in traces)
    end = min(t.arrivals[-1] for t in traces)
    return [after - before for t in traces for before, after in pairwise(t.arrivals) if begin <= before and after <= end]


def tpot(traces: Sequence[Trace]) -> float:
    """Give the median time per output token, in seconds."""
    return quantile([t.tpot for t in traces], 0.5)
