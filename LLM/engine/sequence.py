"""A request on its way through the engine, and the part of it that one step carries. Pure: ids and block numbers only."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from LLM.engine.kv_cache import Hash, chain, root
from LLM.engine.request import GenerationRequest


class TokenCounts:
    """Which tokens a sequence holds and how often it made them: what penalties need, kept up to date as tokens come.

    Parallel arrays without duplicates, so that a sampler reads them without copying: `seen` are all ids, prompt included,
    `made` those the model made, `times` how often.
    """

    def __init__(self) -> None:
        self.seen = array("q")
        self.made = array("q")
        self.times = array("q")
        self._known: set[int] = set()
        self._place: dict[int, int] = {}
        self._counted = 0

    def update(self, token_ids: list[int], prompt_tokens: int) -> None:
        """Count the tokens that came since the last time."""
        for index in range(self._counted, len(token_ids)):
            token_id = token_ids[index]
            if token_id not in self._known:
                self._known.add(token_id)
                self.seen.append(token_id)
            if index < prompt_tokens:
                continue
            if (place := self._place.get(token_id)) is not None:
                self.times[place] += 1
                continue
            self._place[token_id] = len(self.made)
            self.made.append(token_id)
            self.times.append(1)
        self._counted = len(token_ids)


# Stands for a token that was sampled in a step whose results are not read yet.
IN_FLIGHT = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's token ids so far, the blocks they lie in, and how many of them the KV cache holds."""

    request: GenerationRequest
    token_ids: list[int] = field(init=False)
    prompt_tokens: int = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    # Whether its prefill ever began: one that was preempted begins again, but is announced once.
    began: bool = False
    cached_tokens: int = 0
    charged: int = 0  # how many of its tokens were counted as served to its owner, or found in the cache
    _counts: TokenCounts = field(default_factory=TokenCounts)
    _hashes: list[Hash] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.prompt_tokens = len(self.token_ids)

    @property
    def decoding(self) -> bool:
        """Whether all that is still to be computed is the token sampled last."""
        tokens = len(self.token_ids)
        return self.computed == tokens - 1 and tokens > self.prompt_tokens

    @property
    def completion_ids(self) -> list[int]:
        """The ids sampled so far."""
        return self.token_ids[self.prompt_tokens :]

    @property
    def completion_tokens(self) -> int:
        """How many ids were sampled so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def needs_its_tokens(self) -> bool:
        """Whether the next token cannot be drawn before the last one is known."""
        sampling = self.request.sampling
        return sampling.repetition_penalty != 1 or bool(sampling.presence_penalty or sampling.frequency_penalty)

    def forget_in_flight(self) -> None:
        """Make room for the token that was in flight, if one was, now that it is known."""
        if self.token_ids[-1] == IN_FLIGHT:
            self.token_ids.pop()

    def counts(self) -> TokenCounts:
        """Give its token counts as of now."""
        self._counts.update(self.token_ids, self.prompt_tokens)
        return self._counts

    def block_hash(self, index: int, block_size: int) -> Hash:
        """Give the hash of one of its blocks, which must be full; it and those before it are computed once, and only now."""
        for i in range(len(self._hashes), index + 1):
            parent = self._hashes[-1] if self._hashes else root(self.request.cache_scope)
            self._hashes.append(chain(parent, self.token_ids[i * block_size : (i + 1) * block_size]))
        return self._hashes[index]


class Slice(NamedTuple):
    """A run of one sequence's tokens that goes forward in this step; its last one yields a new token if it is the end."""

    sequence: Sequence
    start: int
    stop: int
    # Whether the request's first prefill begins here.
    begins: bool = False

    @property
    def decodes(self) -> bool:
        """Whether this is a decode step: one token, and one that was sampled."""
        return self.samples and self.stop - self.start == 1 and self.sequence.completion_tokens > 0

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after this slice."""
        return self.stop == len(self.sequence.token_ids)
