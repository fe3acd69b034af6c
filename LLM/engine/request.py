"""What crosses the engine's border: frozen plain values, in both directions. Knows neither threads nor tensors.

A stream's parts come in this order: Queued*, Started?, Prefill*, Delta*, and exactly one Finished.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from LLM.errors import Reason

FinishReason = Literal["stop", "length", "cancelled", "timeout", "shutdown", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn from the logits. The defaults change nothing; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to be continued.

    `key` names the request to the engine and must be unique among those open. `end_token_ids` end the text and are
    never shown; they, and they alone, are held off until `min_tokens` tokens exist. `logprobs` is how many alternatives to
    tell with each token's log probability, None for no log probabilities at all. At `deadline`, in seconds of the
    monotonic clock, the request ends wherever it is. `owner` is whose request it is, and `user` for which of the owner's
    users: the line is fair between owners, and between the users of each. What it leaves in the KV cache is found by
    requests of the same `cache_scope` alone.
    """

    key: Hashable
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    end_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    deadline: float | None = None
    owner: Hashable = None
    user: Hashable = None
    cache_scope: str = ""

    @property
    def most_tokens(self) -> int:
        """How many tokens the KV cache may have to hold in the end: the last one sampled is never computed."""
        return len(self.prompt_ids) + self.max_tokens - 1


class Alternative(NamedTuple):
    """A token that could come next, and its log probability in the model's own distribution, before all sampling."""

    token_id: int
    logprob: float


class Sampled(NamedTuple):
    """The token drawn for a sequence; None if it alone failed: its logits were no numbers, or it found no memory.

    `alternatives` is empty unless log probabilities were asked for; then it begins with the drawn token, and the likeliest
    ones follow, that one possibly among them again.
    """

    token_id: int | None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; `position` 1 is the next to start."""

    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """Prefill begins. `cached_tokens` of the prompt were already in the KV cache."""

    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """`done` of the prompt's `total` tokens are in the KV cache."""

    done: int
    total: int


class Scored(NamedTuple):
    """A token with its log probability; `text` is None for a token that is no whole text by itself."""

    token_id: int
    text: str | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that may be shown, and how many tokens' sampling it took to know it; empty where many tokens show nothing.

    `logprobs` has an entry for each of the `n` tokens if they were asked for: the token itself, then its alternatives.
    """

    text: str
    n: int
    logprobs: tuple[tuple[Scored, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the engine got the request; None for what it never reached."""

    total: float
    started: float | None = None
    first_token: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: nothing of this request runs or holds memory any more. `error` is set when `reason` is "error".

    `retry_after` is in how many seconds it is worth trying again, set where too many wait.
    """

    reason: FinishReason
    prompt_tokens: int
    timings: Timings
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: tuple[Reason, str] | None = None
    retry_after: float | None = None


Part = Queued | Started | Prefill | Delta | Finished
