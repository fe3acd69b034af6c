"""Which tokens go forward next: waiting and running requests, packed and chunked prefill, preemption, cancel anywhere.

Pure: no threads, no tensors, no clock. A sequence is waiting (it has no blocks), running, or gone. Every step takes one
token of each sequence that decodes, and fills what is left of its token budget with prompts, those of the owner first that
was served least.
"""

from collections.abc import Hashable, Iterator

from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest
from LLM.engine.scheduling.fair_queue import FairQueue
from LLM.engine.sequence import Sequence, Slice

# Tokens: so much more than the owner that waits must another one have been served for its sequence to be paused.
QUANTUM = 128
# Tokens: so long an answer is expected to be, where places in line are told.
EXPECTED = 128


class Scheduler:
    """A fair line before `capacity` running sequences and the blocks of `pool`.

    While others wait, one owner runs at most `per_owner` sequences, None for half of the capacity.
    """

    def __init__(
        self,
        capacity: int,
        pool: BlockPool,
        pacing: Pacing,
        max_queue: int = 256,
        reuse: bool = True,
        per_owner: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.pool = pool
        self.pacing = pacing
        self.max_queue = max_queue
        self.waiting: FairQueue[Sequence] = FairQueue(lambda: self.per_owner)
        self.running: dict[Hashable, Sequence] = {}
        self._open: dict[Hashable, Sequence] = {}
        self._reuse = reuse
        self._per_owner = per_owner

    @property
    def per_owner(self) -> int:
        """How many sequences one owner may run while others wait."""
        return max(1, self.capacity // 2 if self._per_owner is None else self._per_owner)

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
        cost = len(request.prompt_ids) + min(request.max_tokens, EXPECTED)
        self.waiting.join(sequence, request.owner, request.user, cost)
        return sequence

    def surplus(self) -> Sequence | None:
        """Give the one to be refused, if more are here than may run and wait: the newest of the owner with most in line.

        Never one that had begun and was preempted.
        """
        return self.waiting.last if len(self._open) > self.capacity + self.max_queue else None

    def place_of_owner(self, sequence: Sequence) -> int:
        """Return the position of the first one in line of a sequence's owner, 1 if it has none."""
        owner = sequence.request.owner
        return next((place for place, s in enumerate(self.waiting, 1) if s.request.owner == owner and s is not sequence), 1)

    def remove(self, key: Hashable) -> Sequence | None:
        """Let go of a request, waiting or running, and of its blocks; None if it is gone already."""
        sequence = self._open.pop(key, None)
        if sequence is not None:
            self.running.pop(key, None)
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
        self._make_way()
        for sequence in list(self.running.values()):
            if _goes_on(sequence):  # or it was preempted meanwhile, for another one
                self._make_room(sequence)
        batch = [
            Slice(sequence, sequence.computed, len(sequence.token_ids))
            for sequence in self.running.values()
            if _goes_on(sequence)
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
            self._charge(sequence)
            if self._reuse:
                for index in range(part.start // size, part.stop // size):
                    self.pool.remember(sequence.blocks[index], sequence.block_hash(index, size))

    def distrust(self, sequence: Sequence) -> None:
        """Make nothing findable of what a sequence computed, wherever it lies: it may have lost its blocks meanwhile."""
        size = self.pool.block_size
        full = len(sequence.token_ids) // size
        self.pool.forget(self.pool.find(sequence.block_hash(index, size) for index in range(full)))

    def moved(self, only_new: bool = False) -> list[tuple[Hashable, int]]:
        """Give (key, position) of every waiting request whose position changed since it was last told; 1 is next.

        With `only_new` of those alone that were never told.
        """
        moved = self.waiting.moved(only_new)
        return [(sequence.request.key, place) for sequence, place in moved if not sequence.began]

    def run_one_less(self) -> bool:
        """Put the youngest running sequence back in line and run that many from now on; False if only one runs."""
        if len(self.running) < 2:
            return False
        self.capacity = len(self.running) - 1
        self._preempt(next(reversed(self.running.values())))
        return True

    def _in_prefill(self, admits: bool) -> Iterator[Sequence]:
        """Yield those that have to compute a prompt, running or able to start; first of the owner that was served least."""
        if not admits:
            return
        begun = [s for s in reversed(self.running.values()) if not s.decoding]
        running = sorted(begun, key=self.waiting.served, reverse=True)  # the next one last, the oldest of equals
        head = self._next_to_start()
        while running or head:
            if head is None or (running and self.waiting.served(running[-1]) <= self.waiting.served(head)):
                yield running.pop()
            elif self._admit(head):
                self.running[head.request.key] = self.waiting.serve()
                yield head
                head = self._next_to_start()
            else:
                head = None

    def _next_to_start(self) -> Sequence | None:
        """Return the one in line that may start, None if no place is free or its last token is on its way."""
        head = self.waiting.next if len(self.running) < self.capacity else None
        return None if head is None or _at_its_end(head) else head

    def _make_way(self) -> None:
        """Pause a sequence for the next one in line, if that finds no room and its owner was served too little.

        One at most in a step: that is soon enough, and none is paused for nothing.
        """
        head = self.waiting.next
        if head is None or _at_its_end(head) or self._fits(head):
            return
        yielding = [
            s
            for s in reversed(self.running.values())
            # A long one costs the more to compute again: it is paused the less often.
            if not _at_its_end(s) and self.waiting.outranks(head, s, max(QUANTUM, len(s.token_ids) // 8))
        ]
        if yielding:
            self._preempt(max(yielding, key=self.waiting.served))

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are a place and blocks for a waiting sequence."""
        if len(self.running) >= self.capacity:
            return False
        found = self._found(sequence)
        return self.pool.has(self._blocks_to_start(sequence) - len(found), beside=found)

    def _found(self, sequence: Sequence) -> list[int]:
        # The last token is computed again in any case: its logits are what the next token is drawn from.
        size = self.pool.block_size
        return self.pool.find(sequence.block_hash(index, size) for index in range((len(sequence.token_ids) - 1) // size))

    def _blocks_to_start(self, sequence: Sequence) -> int:
        # Room for the next token too: a sequence that came to the end of its blocks would only be preempted again.
        return self.pool.blocks_for(min(len(sequence.token_ids) + 1, sequence.request.most_tokens))

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks for its tokens, reusing those that are found."""
        found = self._found(sequence)
        self.pool.share(found)
        fresh = self.pool.take(self._blocks_to_start(sequence) - len(found))
        if fresh is None:
            self.pool.release(found)
            return False
        sequence.blocks = found + fresh
        sequence.computed = len(found) * self.pool.block_size
        sequence.charged = max(sequence.charged, sequence.computed)
        if not sequence.began:
            sequence.cached_tokens = sequence.computed
        return True

    def _make_room(self, sequence: Sequence) -> None:
        """Make room for a decoding sequence's token, if need be by preempting, of the owner served most, the youngest."""
        while sequence.blocks and len(sequence.blocks) * self.pool.block_size < len(sequence.token_ids):
            if fresh := self.pool.take(1):
                sequence.blocks += fresh
            else:
                self._preempt(max(reversed(self.running.values()), key=self.waiting.served))

    def _preempt(self, sequence: Sequence) -> None:
        # By recomputation: it goes before its owner's others in line, and finds again what was not needed meanwhile.
        del self.running[sequence.request.key]
        self._release(sequence)
        self.waiting.put_back(sequence)

    def _charge(self, sequence: Sequence) -> None:
        # What is computed again after a pause is not the owner's doing, and what was found in the cache cost nothing.
        if sequence.computed > sequence.charged:
            self.waiting.charge(sequence, sequence.computed - sequence.charged)
            sequence.charged = sequence.computed

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


def _goes_on(sequence: Sequence) -> bool:
    return sequence.decoding and not _at_its_end(sequence)


def _at_its_end(sequence: Sequence) -> bool:
    # Its last token is on its way; another step for it would be for nothing.
    return sequence.completion_tokens >= sequence.request.max_tokens
