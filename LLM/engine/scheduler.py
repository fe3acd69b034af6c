"""Which tokens go forward next: waiting and running requests, packed and chunked prefill, preemption, cancel anywhere.

Pure: no threads, no tensors, no clock. A sequence is waiting (it has no blocks), running, or gone. Every step takes one
token of each sequence that decodes, and fills what is left of its token budget with prompts, as the line has them.
"""

from collections.abc import Hashable, Iterator

from LLM.engine.kv_cache import BlockPool
from LLM.engine.line import Line
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest
from LLM.engine.sequence import Sequence, Slice


class Scheduler:
    """A fair line before `capacity` running sequences and the blocks of `pool`."""

    def __init__(self, capacity: int, pool: BlockPool, pacing: Pacing, max_queue: int = 256, reuse: bool = True) -> None:
        self.capacity = capacity
        self.pool = pool
        self.pacing = pacing
        self.max_queue = max_queue
        self.waiting: Line[Sequence] = Line()
        self.running: dict[Hashable, Sequence] = {}
        self._open: dict[Hashable, Sequence] = {}
        self._reuse = reuse

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._open

    @property
    def keys(self) -> list[Hashable]:
        """The keys of all that wait or run."""
        return list(self._open)

    def can_ever_run(self, request: GenerationRequest) -> bool:
        """Whether the whole cache is large enough for this request alone."""
        return self.pool.blocks_for(request.most_tokens) <= self.pool.count

    def add(self, request: GenerationRequest) -> Sequence:
        """Take a request that can ever run into the line."""
        sequence = self._open[request.key] = Sequence(request)
        self.waiting.join(sequence, request.owner)
        return sequence

    def surplus(self) -> Sequence | None:
        """Give the one to be refused, if more are here than may run and wait: of those in line who would be served last.

        Never one that had begun and was preempted.
        """
        return self.waiting.last if len(self._open) > self.capacity + self.max_queue else None

    def remove(self, key: Hashable) -> Sequence | None:
        """Let go of a request, waiting or running, and of its blocks; None if it is gone already."""
        sequence = self._open.pop(key, None)
        if sequence is not None:
            if not self.running.pop(key, None):
                self.waiting.leave(sequence)
            self._release(sequence)
        return sequence

    def holds(self, sequence: Sequence) -> bool:
        """Whether it is still waiting or running; its key may be another's by now."""
        return self._open.get(sequence.request.key) is sequence

    def expired(self, now: float) -> list[Hashable]:
        """Give the keys of those whose deadline has come, waiting or running."""
        return [key for key, s in self._open.items() if s.request.deadline is not None and s.request.deadline <= now]

    def next_batch(self) -> list[Slice]:
        """Give the slices of the next step, those that decode first; empty if idle.

        Nothing counts as computed before `retire`: a step that failed for want of memory may simply be asked for again.
        """
        # One that is preempted on the way, for an older one, has nothing computed any more and does not decode.
        batch = [
            Slice(sequence, sequence.computed, len(sequence.token_ids))
            for sequence in list(self.running.values())
            if sequence.decoding and not _at_its_end(sequence) and self._has_room(sequence)
        ]
        budget = self.pacing.prefill_budget(decoding=len(batch))
        for sequence in self._in_prefill(budget > 0):
            stop = min(sequence.computed + budget, len(sequence.token_ids))
            budget -= stop - sequence.computed
            batch.append(Slice(sequence, sequence.computed, stop, begins=not sequence.began))
            sequence.began = True
            if not budget:
                break
        return batch

    def retire(self, batch: list[Slice]) -> None:
        """Count a step's slices as computed, and make the blocks they filled findable."""
        for part in batch:
            sequence, size = part.sequence, self.pool.block_size
            if not self.holds(sequence):
                continue  # it ended meanwhile
            sequence.computed = part.stop
            if self._reuse:
                for index in range(part.start // size, part.stop // size):
                    self.pool.remember(sequence.blocks[index], sequence.block_hash(index, size))

    def distrust(self, sequence: Sequence) -> None:
        """Make nothing findable of what a sequence computed, wherever it lies: it may have lost its blocks meanwhile."""
        size = self.pool.block_size
        full = len(sequence.token_ids) // size
        self.pool.forget(self.pool.find(sequence.block_hash(index, size) for index in range(full)))

    def moved(self) -> list[tuple[Hashable, int]]:
        """Give (key, position) of every waiting request whose position changed since it was last told; 1 is next."""
        return [(sequence.request.key, place) for sequence, place in self.waiting.moved() if not sequence.began]

    def run_one_less(self) -> bool:
        """Put the youngest running sequence back in line and run that many from now on; False if only one runs."""
        if len(self.running) < 2:
            return False
        self.capacity = len(self.running) - 1
        self._preempt(next(reversed(self.running.values())))
        return True

    def _in_prefill(self, admits: bool) -> Iterator[Sequence]:
        """Give the running sequences that have to compute a prompt, then those that can start to run."""
        if not admits:
            return
        yield from [s for s in self.running.values() if not s.decoding]
        while self.waiting and len(self.running) < self.capacity:
            sequence = next(iter(self.waiting))
            if _at_its_end(sequence) or not self._admit(sequence):
                return
            self.running[sequence.request.key] = self.waiting.serve()
            yield sequence

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks for its tokens, reusing those that are found."""
        # The last token is computed again in any case: its logits are what the next token is drawn from.
        size = self.pool.block_size
        reusable = (len(sequence.token_ids) - 1) // size
        found = self.pool.find(sequence.block_hash(index, size) for index in range(reusable))
        self.pool.share(found)
        # Room for the next token too: a sequence that came to the end of its blocks would only be preempted again.
        tokens = min(len(sequence.token_ids) + 1, sequence.request.most_tokens)
        fresh = self.pool.take(self.pool.blocks_for(tokens) - len(found))
        if fresh is None:
            self.pool.release(found)
            return False
        sequence.blocks = found + fresh
        sequence.computed = len(found) * size
        if not sequence.began:
            sequence.cached_tokens = sequence.computed
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        """Make room for a decoding sequence's token, if need be by preempting the youngest; False if that is itself."""
        while len(sequence.blocks) * self.pool.block_size < len(sequence.token_ids):
            if fresh := self.pool.take(1):
                sequence.blocks += fresh
                continue
            youngest = next(reversed(self.running.values()))
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        # By recomputation: it goes back to the head of the line, and finds again what nobody needed meanwhile.
        del self.running[sequence.request.key]
        self._release(sequence)
        self.waiting.put_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


def _at_its_end(sequence: Sequence) -> bool:
    # Its last token is on its way; another step for it would be for nothing.
    return sequence.completion_tokens >= sequence.request.max_tokens
