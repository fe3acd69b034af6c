"""One request's way from sampled ids to parts: its text, its end, its times, its stream. Knows no other request."""

import time

from tokenizers import Tokenizer

from LLM.engine.detokenizer import Detokenizer
from LLM.engine.request import Alternative, Delta, Finished, FinishReason, Prefill, Scored, Started, Timings
from LLM.engine.sequence import Sequence
from LLM.engine.stream import GenerationStream
from LLM.engine.undecodable import REPLACEMENT

# Tokens without text that are told together: what counts tokens hears of them, and their log probabilities do not pile up.
HIDDEN = 32
PREFILL_INTERVAL = 0.2  # seconds between two Prefill parts of one request


class Answer:
    """One request's way from token ids to parts: its text, its end, its times."""

    def __init__(self, stream: GenerationStream, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.stream = stream
        self.request = sequence.request
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, self.request.prompt_ids, self.request.stop)
        # Tokens sampled since the last Delta, and what is to be told of them.
        self._unseen = 0
        self._unseen_logprobs: list[tuple[Scored, ...]] = []
        self._arrived = time.monotonic()
        self._prefill_told = 0.0
        self._prefill_done = 0
        self._started: float | None = None
        self._first_token: float | None = None

    @property
    def ran(self) -> float:
        """How many seconds ago it started, 0.0 if it did not."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def start(self) -> Started:
        """Begin its prefill."""
        self._started = time.monotonic()
        return Started(len(self.request.prompt_ids), self._sequence.cached_tokens)

    def prefill(self, done: int) -> Prefill | None:
        """Tell the prefill's progress, unless that was told a moment ago, or before the sequence was preempted."""
        now = time.monotonic()
        if now - self._prefill_told < PREFILL_INTERVAL or done <= self._prefill_done or self._first_token:
            return None
        self._prefill_told, self._prefill_done = now, done
        return Prefill(done, len(self.request.prompt_ids))

    def take(self, token_id: int, alternatives: tuple[Alternative, ...]) -> tuple[Delta | None, FinishReason | None]:
        """Append a sampled token; give the text that became safe to show, and the reason if this is the end.

        Now and then the text is empty: so many tokens were sampled that show nothing.
        """
        self._sequence.token_ids.append(token_id)
        if alternatives:
            self._unseen_logprobs.append(tuple(self._scored(*alternative) for alternative in alternatives))
        self._first_token = self._first_token or time.monotonic()
        self._unseen += 1
        if token_id in self.request.end_token_ids:
            return self._delta(self._detokenizer.flush()), "stop"
        text = self._detokenizer.push(token_id)
        at_limit = self._sequence.completion_tokens >= self.request.max_tokens
        if at_limit:
            text += self._detokenizer.flush()
        if self._detokenizer.stopped:
            return self._delta(text), "stop"
        return self._delta(text), "length" if at_limit else None

    def finished(self, reason: FinishReason) -> Finished:
        """Give the end, with its counts and times."""
        self._sequence.forget_in_flight()
        return Finished(
            reason=reason,
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=self._sequence.completion_tokens,
            cached_tokens=self._sequence.cached_tokens,
            timings=Timings(
                total=time.monotonic() - self._arrived,
                started=self._started and self._started - self._arrived,
                first_token=self._first_token and self._first_token - self._arrived,
            ),
        )

    def _delta(self, text: str) -> Delta | None:
        if not text and self._unseen < HIDDEN:
            return None
        delta = Delta(text, self._unseen, tuple(self._unseen_logprobs))
        self._unseen = 0
        self._unseen_logprobs.clear()
        return delta

    def _scored(self, token_id: int, logprob: float) -> Scored:
        # As it reads behind another token, here itself: where a text begins, some decoders leave a leading space out.
        alone, twice = (self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return Scored(token_id, None if REPLACEMENT in twice else twice[len(alone) :], logprob)
