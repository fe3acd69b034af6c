"""Which sequence goes forward next: waiting and running requests, chunked prefill, cancel in every state.

Pure: no threads, no tensors, no clock. A sequence is waiting, running (its prefill done in chunks, then decoding) or gone.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from LLM.engine.request import GenerationRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: its token ids so far, and how many of them the KV cache holds."""

    request: GenerationRequest
    token_ids: list[int] = field(init=False)
    computed: int = 0
    position_told: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.computed < len(self.request.prompt_ids)

    @property
    def completion_ids(self) -> list[int]:
        """The ids sampled so far."""
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def completion_tokens(self) -> int:
        """How many ids were sampled so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)


class Slice(NamedTuple):
    """A run of one sequence's tokens that goes forward in this step; its last one yields a new token if it is the end."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def begins(self) -> bool:
        """Whether the request's prefill begins here."""
        return self.start == 0

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after this slice."""
        return self.stop == len(self.sequence.token_ids)


class Scheduler:
    """First come, first served over `capacity` running sequences.

    A step is either one chunk of one prompt or one token of every decoding sequence; the two alternate, so that a long
    prompt neither waits for the running streams nor freezes them.
    """

    def __init__(self, capacity: int, prefill_chunk: int = 256, max_waiting: int = 256) -> None:
        self.capacity = capacity
        self.prefill_chunk = prefill_chunk
        self.max_waiting = max_waiting
        self.waiting: dict[Hashable, Sequence] = {}
        self.running: dict[Hashable, Sequence] = {}
        self._decode_is_due = False

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, request: GenerationRequest) -> Sequence | None:
        """Take a request in at the end of the line; None if the line is full."""
        if len(self.waiting) >= self.max_waiting:
            return None
        sequence = self.waiting[request.key] = Sequence(request)
        return sequence

    def remove(self, key: Hashable) -> Sequence | None:
        """Let go of a request, waiting or running; None if it is gone already."""
        return self.waiting.pop(key, None) or self.running.pop(key, None)

    def next_batch(self) -> list[Slice]:
        """Give the slices of the next step, empty if idle; their tokens count as computed from here on."""
        prompt = self._prompt_in_prefill()
        decoding = [s for s in self.running.values() if not s.prefilling]
        if prompt and not (self._decode_is_due and decoding):
            self._decode_is_due = True
            stop = min(prompt.computed + self.prefill_chunk, len(prompt.token_ids))
            batch = [Slice(prompt, prompt.computed, stop)]
        else:
            self._decode_is_due = False
            batch = [Slice(s, s.computed, len(s.token_ids)) for s in decoding]
        for sequence, _, stop in batch:
            sequence.computed = stop
        return batch

    def moved(self) -> list[tuple[Hashable, int]]:
        """Give (key, position) of every waiting request whose position changed since it was last told; 1 is next."""
        moved = []
        for position, (key, sequence) in enumerate(self.waiting.items(), 1):
            if sequence.position_told != position:
                sequence.position_told = position
                moved.append((key, position))
        return moved

    def _prompt_in_prefill(self) -> Sequence | None:
        # One prompt at a time: the others' first tokens come sooner than if all shared the steps.
        prompt = next((s for s in self.running.values() if s.prefilling), None)
        if prompt is None and self.waiting and len(self.running) < self.capacity:
            key = next(iter(self.waiting))
            prompt = self.running[key] = self.waiting.pop(key)
        return prompt
