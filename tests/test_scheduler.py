"""The scheduler, driven as the engine drives it, with a model whose KV cache is a table that shows every wrong entry."""

from collections.abc import Hashable
from collections.abc import Sequence as Ids
from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from LLM.engine.kv_cache import ROOT, BlockPool, chain
from LLM.engine.pacing import STALE, Pacing
from LLM.engine.request import GenerationRequest
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import Sequence, Slice

VOCABULARY = 3  # so few tokens that texts often begin alike
SPOILT = -7


def entries(ids: Ids[int]) -> list[int]:
    """What a KV cache has to hold for these tokens: an entry depends on its token and on all before it."""
    return list(accumulate(ids, lambda before, token_id: hash((before, token_id)), initial=0))[1:]


def likeliest(held: list[int]) -> int:
    """Give the token that comes next by all entries that the cache holds of a sequence."""
    return hash(tuple(held)) % VOCABULARY


def ideal(prompt: Ids[int], count: int) -> list[int]:
    """What a model answers that computes everything anew for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(likeliest(entries(ids)))
    return ids[len(prompt) :]


class Table:
    """A model with a paged KV cache: it computes what its slices say, over what the sequences' blocks hold."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, int] = {}

    def held(self, blocks: list[int], tokens: int) -> list[int]:
        return [self.slots[blocks[i // self.block_size] * self.block_size + i % self.block_size] for i in range(tokens)]

    def step(self, batch: list[Slice]) -> list[int | None]:
        """All slices are written before any is read, as in each layer of a packed forward pass."""
        for part in batch:
            before = self.held(part.sequence.blocks, part.start)[-1:] or [0]
            ids = part.sequence.token_ids[part.start : part.stop]
            self._write(part, list(accumulate(ids, lambda b, token_id: hash((b, token_id)), initial=before[0]))[1:])
        return [likeliest(self.held(p.sequence.blocks, p.stop)) if p.samples else None for p in batch]

    def fail(self, batch: list[Slice]) -> None:
        """Run out of memory when the step's entries are written, but wrong."""
        for part in batch:
            self._write(part, [SPOILT] * (part.stop - part.start))

    def _write(self, part: Slice, values: list[int]) -> None:
        for i, value in enumerate(values, part.start):
            self.slots[part.sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size] = value


class Budget(Pacing):
    """Gives a step so many prompt tokens as a test wants, but never none when nothing else can run."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.decoding = 0

    def prefill_budget(self, decoding: int) -> int:
        self.decoding = decoding
        return self.largest if decoding else max(1, self.largest)


def findable(pool: BlockPool, ids: list[int]) -> list[int]:
    """Give the blocks in which a text's beginning can be found."""
    size = pool.block_size
    full = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return pool.find(list(accumulate(full, chain, initial=ROOT))[1:])


class Engine:
    """Steps as the worker does; a request ends when it has its `max_tokens`."""

    def __init__(
        self,
        capacity: int = 4,
        blocks: int = 64,
        size: int = 4,
        budget: int | Pacing = 8,
        line: int = 256,
        reuse: bool = True,
    ) -> None:
        self.pool = BlockPool(blocks, size)
        self.pacing = Budget(budget) if isinstance(budget, int) else budget
        self.scheduler = Scheduler(capacity, self.pool, self.pacing, line, reuse)
        self.table = Table(size)
        self.sequences: dict[Hashable, Sequence] = {}
        self.ended: dict[Hashable, list[int]] = {}
        self.computed = 0

    def ask(
        self, key: Hashable, prompt: Ids[int], max_tokens: int = 50, deadline: float | None = None, owner: Hashable = None
    ) -> Hashable:
        return self.add(GenerationRequest(key, tuple(prompt), max_tokens, deadline=deadline, owner=owner))

    def add(self, request: GenerationRequest) -> Hashable:
        """Take a request in; give the key of the one that is refused for it, None if nobody is."""
        assert self.scheduler.can_ever_run(request)
        self.sequences[request.key] = self.scheduler.add(request)
        if (surplus := self.scheduler.surplus()) is None:
            return None
        assert self.scheduler.remove(surplus.request.key) is self.sequences.pop(surplus.request.key) is surplus
        assert not surplus.began
        return surplus.request.key

    def run(self, batch: list[Slice]) -> None:
        tokens = self.table.step(batch)
        self.scheduler.retire(batch)
        for part, token_id in zip(batch, tokens, strict=True):
            self.computed += part.stop - part.start
            if token_id is None:
                continue
            part.sequence.token_ids.append(token_id)
            if part.sequence.completion_tokens == part.sequence.request.max_tokens:
                self.end(part.sequence.request.key)

    def end(self, key: Hashable) -> Sequence:
        removed = self.scheduler.remove(key)
        assert removed is self.sequences[key]
        assert key not in self.ended
        self.ended[key] = removed.completion_ids
        return removed

    def step(self) -> list[tuple[Hashable, int, int]]:
        batch = self.scheduler.next_batch()
        self.run(batch)
        return [(part.sequence.request.key, part.start, part.stop) for part in batch]

    def steps(self, count: int) -> list[list[tuple[Hashable, int, int]]]:
        return [self.step() for _ in range(count)]

    def finish(self) -> int:
        """Step until nothing is left to do; give how many steps that took."""
        enough = 2 * sum(sequence.request.most_tokens for sequence in self.sequences.values()) + 1
        for count in range(enough):
            if self.scheduler.idle:
                return count
            self.step()
        raise AssertionError("it does not come to an end")

    def __getitem__(self, key: Hashable) -> Sequence:
        return self.sequences[key]

    @property
    def where(self) -> tuple[list[Hashable], list[Hashable]]:
        return list(self.scheduler.running), [sequence.request.key for sequence in self.scheduler.waiting]


def test_with_nothing_to_do_there_is_no_batch() -> None:
    engine = Engine()
    assert engine.scheduler.idle
    assert engine.scheduler.next_batch() == engine.scheduler.moved() == engine.scheduler.expired(1e9) == []


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        (1, [(0, 1)]),
        (3, [(0, 3)]),
        (4, [(0, 4)]),
        (5, [(0, 4), (4, 5)]),
        (12, [(0, 4), (4, 8), (8, 12)]),
    ],
)
def test_a_prompt_goes_forward_in_chunks_then_token_by_token(prompt: int, chunks: list[tuple[int, int]], size: int) -> None:
    engine = Engine(size=size, budget=4)
    engine.ask("a", range(prompt))
    tokens = [(prompt, prompt + 1), (prompt + 1, prompt + 2)]
    assert engine.steps(len(chunks) + 2) == [[("a", *part)] for part in chunks + tokens]


def test_one_step_carries_every_stream_and_the_prompts_for_which_there_is_room_in_the_order_in_which_they_came() -> None:
    engine = Engine(capacity=6, budget=8)
    engine.ask("a", range(3))
    engine.ask("b", range(3, 7))
    assert engine.step() == [("a", 0, 3), ("b", 0, 4)]
    for key, prompt in {"c": 2, "d": 9, "e": 4, "f": 1}.items():
        engine.ask(key, range(prompt))
    streams = [("a", 3, 4), ("b", 4, 5)]
    assert engine.step() == [*streams, ("c", 0, 2), ("d", 0, 6)]
    streams = [("a", 4, 5), ("b", 5, 6), ("c", 2, 3)]
    assert engine.step() == [*streams, ("d", 6, 9), ("e", 0, 4), ("f", 0, 1)]
    assert engine.step() == [("a", 5, 6), ("b", 6, 7), ("c", 3, 4), ("d", 9, 10), ("e", 4, 5), ("f", 1, 2)]


def test_the_end_of_a_prompt_counts_as_prompt_however_short_it_is() -> None:
    engine = Engine(budget=4)
    engine.ask("a", range(5))
    engine.ask("b", range(5, 9))
    assert engine.steps(3) == [[("a", 0, 4)], [("a", 4, 5), ("b", 0, 3)], [("a", 5, 6), ("b", 3, 4)]]


def test_pacing_hears_how_many_streams_it_would_hold_up_and_none_is_held_up_by_a_step_to_measure_by() -> None:
    engine = Engine(budget=4)
    engine.ask("a", range(5))
    engine.steps(2)
    assert engine.pacing.decoding == 0, "the end of a prompt is no stream"
    engine.ask("b", range(9))
    engine.pacing.largest = 0
    assert engine.step() == [("a", 5, 6)]
    assert engine.pacing.decoding == 1
    assert engine.where == (["a"], ["b"])


def test_only_the_first_slice_begins_and_only_those_at_the_end_sample() -> None:
    engine, seen = Engine(budget=4), []
    engine.ask("a", range(6))
    for _ in range(4):
        (part,) = batch = engine.scheduler.next_batch()
        seen.append((part.begins, part.samples, part.decodes))
        engine.run(batch)
    assert seen == [(True, False, False), (False, True, False), (False, True, True), (False, True, True)]


def test_no_more_than_the_capacity_run_and_the_next_begins_when_one_goes() -> None:
    engine = Engine(capacity=2)
    for key in "abc":
        engine.ask(key, range(1))
    engine.steps(3)
    assert engine.where == (["a", "b"], ["c"])
    engine.end("a")
    assert ("c", 0, 1) in engine.step()
    assert engine.where == (["b", "c"], [])


def test_a_full_line_takes_no_one_until_someone_leaves_it() -> None:
    engine = Engine(capacity=1, line=2)
    assert [engine.ask(key, range(1)) for key in "abcd"] == [None, None, None, "d"], "for one of them there is a place"
    engine.step()
    assert engine.ask("e", range(1)) == "e"
    engine.end("b")
    assert [engine.ask(key, range(1)) for key in "fg"] == [None, "g"]
    assert engine.where == (["a"], ["c", "f"])


def test_without_a_line_only_those_are_taken_for_whom_there_is_a_place() -> None:
    engine = Engine(capacity=2, line=0)
    assert [engine.ask(key, range(1)) for key in "abc"] == [None, None, "c"]
    engine.step()
    assert engine.ask("d", range(1)) == "d"
    engine.end("a")
    assert engine.ask("e", range(1)) is None


def test_who_has_few_in_line_takes_the_place_of_the_last_one_of_who_has_many() -> None:
    engine = Engine(capacity=1, line=3)
    assert [engine.ask(key, range(1), owner="many") for key in "abcd"] == [None] * 4
    engine.step()
    assert engine.ask("x", range(1), owner="few") == "d"
    assert engine.where == (["a"], ["x", "b", "c"])
    assert engine.ask("y", range(1), owner="few") == "y"
    assert engine.ask("z", range(1), owner="another") == "c"
    assert engine.where == (["a"], ["x", "z", "b"])


def test_one_that_had_begun_and_was_preempted_is_not_refused_for_want_of_a_place_in_line() -> None:
    engine = Engine(capacity=3, line=1)
    for key in "abcd":
        engine.ask(key, range(3), max_tokens=9)
    engine.steps(2)
    assert engine.scheduler.run_one_less()
    assert engine.where == (["a", "b"], ["c", "d"])
    assert engine.ask("e", range(3), owner="another") == "e"
    engine.end("d")
    assert engine.ask("f", range(3), owner="another") == "f"
    engine.end("a")
    assert engine.ask("g", range(3), owner="another") is None
    assert engine.where == (["b"], ["g", "c"])


def test_positions_get_worse_for_those_behind_whom_a_lighter_owner_comes() -> None:
    engine = Engine(capacity=1)
    for key in "abc":
        engine.ask(key, range(1), owner="many")
    engine.step()
    assert engine.scheduler.moved() == [("b", 1), ("c", 2)]
    engine.ask("x", range(1), owner="few")
    assert engine.scheduler.moved() == [("x", 1), ("b", 2), ("c", 3)]


def test_positions_are_told_when_they_change_and_only_then() -> None:
    engine = Engine(capacity=1)
    moved = engine.scheduler.moved
    engine.ask("a", range(1))
    assert moved() == [("a", 1)]
    engine.step()
    assert moved() == []
    for key in "bcd":
        engine.ask(key, range(1))
    assert moved() == [("b", 1), ("c", 2), ("d", 3)]
    engine.step()
    assert moved() == []
    engine.end("c")
    assert moved() == [("d", 2)]
    engine.end("a")
    engine.step()
    assert moved() == [("d", 1)]


@pytest.mark.parametrize("before", [0, 1, 2, 3, 6], ids=["waiting", "in prefill", "still in prefill", "decoding", "later"])
def test_a_removed_request_is_gone_in_every_state_and_the_others_go_on(before: int) -> None:
    engine = Engine(capacity=2, budget=4)
    engine.ask("a", range(9))
    engine.ask("b", range(1))
    engine.steps(before)
    engine.end("a")
    assert engine.scheduler.remove("a") is None
    assert {key for batch in engine.steps(3) for key, _, _ in batch} == {"b"}
    engine.end("b")
    assert engine.scheduler.idle
    assert engine.pool.free == engine.pool.count


def test_an_unknown_key_cannot_be_removed() -> None:
    assert Engine().scheduler.remove("b") is None


@pytest.mark.parametrize("before", range(8))
def test_when_every_request_is_cancelled_in_one_step_all_blocks_are_free_before_the_next(before: int) -> None:
    engine = Engine(capacity=3, blocks=8, size=2, budget=4)
    for key in range(9):
        engine.ask(key, range(key + 1), max_tokens=5)
    engine.steps(before)
    for key in engine.scheduler.keys:
        engine.end(key)
    assert (engine.pool.free, engine.scheduler.idle, engine.scheduler.next_batch()) == (8, True, [])
    assert engine.ended.keys() == set(range(9))


def test_two_hundred_requests_are_served_in_four_places_in_the_order_in_which_they_came() -> None:
    engine, begun = Engine(capacity=4, blocks=24), []
    for key in range(200):
        assert engine.ask(key, [key % 7, key % 5, key % 3], max_tokens=1 + key % 10) is None
    for _ in range(200 * 12):
        begun += [key for key, start, _ in engine.step() if start == 0]
        assert len(engine.scheduler.running) <= 4
    assert begun == list(range(200))
    assert engine.ended == {key: ideal([key % 7, key % 5, key % 3], 1 + key % 10) for key in range(200)}


@pytest.mark.parametrize("steps", [0, 1, 5], ids=["waiting", "in prefill", "decoding"])
@pytest.mark.parametrize(("now", "expired"), [(9.9, []), (10.0, ["b"]), (11.0, ["b", "c"])])
def test_who_is_past_its_deadline_is_named_wherever_it_is(now: float, expired: list[str], steps: int) -> None:
    engine = Engine(capacity=3, budget=4)
    for key, deadline in {"a": None, "b": 10.0, "c": 11.0, "d": 12.0}.items():
        engine.ask(key, range(5), deadline=deadline)
    engine.steps(steps)
    assert sorted(engine.scheduler.expired(now)) == expired


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"), [(16, 1, True), (17, 1, False), (1, 16, True), (1, 17, False), (9, 8, True)]
)
def test_a_request_can_run_if_the_whole_cache_holds_all_but_its_last_token(prompt: int, max_tokens: int, fits: bool) -> None:
    request = GenerationRequest("a", (0,) * prompt, max_tokens)
    assert Engine(blocks=4, size=4).scheduler.can_ever_run(request) == fits


@pytest.mark.parametrize("prompt", [1, 9, 13, 15, 16])
def test_a_request_that_fills_the_cache_exactly_is_served_beside_others_and_after_one_like_it(prompt: int) -> None:
    engine = Engine(blocks=4, size=4)
    for key in range(3):
        engine.ask(key, range(prompt), max_tokens=17 - prompt)
    engine.ask("short", range(2), max_tokens=3)
    engine.finish()
    assert engine.ended == {key: ideal(range(prompt), 17 - prompt) for key in range(3)} | {"short": ideal(range(2), 3)}


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(
    ("size", "prompt", "cached"), [(4, 3, 0), (4, 4, 0), (4, 5, 4), (4, 8, 4), (4, 9, 8), (1, 1, 0), (1, 5, 4), (16, 40, 32)]
)
def test_of_a_known_prompt_its_full_blocks_are_reused_but_never_its_last_token(
    size: int, prompt: int, cached: int, reuse: bool
) -> None:
    engine = Engine(size=size, budget=100, reuse=reuse)
    engine.ask("a", range(prompt), max_tokens=3)
    engine.finish()
    engine.ask("b", range(prompt), max_tokens=3)
    engine.ask("c", [*range(prompt), 99], max_tokens=3)
    first = engine.step()[0]
    assert first == ("b", cached if reuse else 0, prompt)
    assert engine["b"].cached_tokens == first[1]
    assert engine["c"].cached_tokens == (prompt // size * size if reuse else 0)
    engine.finish()
    assert engine.ended == {key: ideal(s.request.prompt_ids, 3) for key, s in engine.sequences.items()}


def test_what_runs_now_is_shared_as_soon_as_its_blocks_are_full() -> None:
    engine = Engine(blocks=12, size=4, budget=12)
    engine.ask("a", range(20), max_tokens=9)
    engine.step()
    engine.ask("b", range(20), max_tokens=9)
    engine.step()
    assert engine["b"].blocks[:3] == engine["a"].blocks[:3]
    assert engine["b"].blocks[3:] != engine["a"].blocks[3:]
    assert engine["b"].cached_tokens == 12


def test_a_prompt_that_nobody_knows_is_hashed_as_it_is_computed_and_not_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr("LLM.engine.sequence.chain", lambda parent, ids: hashed.append(ids) or chain(parent, ids))
    engine = Engine(blocks=300, size=4, budget=12)
    engine.ask("a", range(1000))
    engine.steps(5)
    assert len(hashed) == 15


@pytest.mark.parametrize("cancelled_after", [None, 1, 7, 48])
def test_a_ten_turn_chat_computes_each_token_about_once_also_when_answers_are_cancelled(cancelled_after: int | None) -> None:
    engine, chat, prefilled = Engine(blocks=256, size=16, budget=64), [], 0
    for turn in range(10):
        chat += range(1000 * turn, 1000 * turn + 100)
        engine.ask(turn, chat, max_tokens=100)
        while turn not in engine.ended:
            batch = engine.scheduler.next_batch()
            prefilled += sum(part.stop - part.start for part in batch if not part.decodes)
            engine.run(batch)
            if engine[turn].completion_tokens == cancelled_after:
                engine.end(turn)
        chat += engine.ended[turn]
    assert engine.computed - len(chat) <= 10 * 16, "of each turn less than a block is computed again"
    assert prefilled < 1.1 * len(chat)


def test_the_turn_that_was_longest_not_used_is_forgotten_first_and_from_its_end() -> None:
    engine = Engine(blocks=6, size=4, budget=100)
    for key, prompt in {"a": [1] * 8, "b": [2] * 8}.items():
        engine.ask(key, prompt, max_tokens=1)
        engine.finish()
    engine.ask("c", [3] * 12, max_tokens=1)  # takes the two empty ones, and one more
    engine.finish()
    assert [len(findable(engine.pool, [token_id] * 12)) for token_id in (1, 2, 3)] == [1, 2, 3]


def tight() -> Engine:
    """Two streams, of which the younger must give way in the third step, and two more in line."""
    engine = Engine(capacity=2, blocks=5, size=2, budget=8)
    for key, first in {"a": 0, "b": 10, "c": 20, "d": 30}.items():
        engine.ask(key, range(first, first + 3), max_tokens=5)
    return engine


def test_who_gives_way_to_an_older_one_is_next_in_line_announced_once_and_told_no_position() -> None:
    engine, begun, moved = tight(), [], []
    for _ in range(3):
        batch = engine.scheduler.next_batch()
        begun += [part.sequence.request.key for part in batch if part.begins]
        moved.append(engine.scheduler.moved())
        engine.run(batch)
    assert engine.where == (["a"], ["b", "c", "d"])
    assert (engine["b"].blocks, engine["b"].computed, engine["b"].completion_tokens) == ([], 0, 2)
    assert moved == [[("c", 1), ("d", 2)], [], [("c", 2), ("d", 3)]]
    for _ in range(4 * 7):
        batch = engine.scheduler.next_batch()
        begun += [part.sequence.request.key for part in batch if part.begins]
        assert "b" not in dict(engine.scheduler.moved())
        engine.run(batch)
    assert begun == ["a", "b", "c", "d"]
    assert engine.ended == {key: ideal(engine[key].request.prompt_ids, 5) for key in "abcd"}


def test_who_was_preempted_finds_again_what_nobody_needed() -> None:
    engine = tight()
    engine.steps(3)
    engine.end("a")
    assert engine.step()[0] == ("b", 4, 5)
    assert engine["b"].cached_tokens == 0, "what it began with is what was told"


def test_the_oldest_gives_way_to_nobody_and_whose_blocks_are_shared_takes_none_with_it() -> None:
    engine = Engine(capacity=3, blocks=6, size=2, budget=20)
    engine.ask("a", [1, 1, 1, 1, 1], max_tokens=8)
    engine.step()
    for key in "bc":
        engine.ask(key, [1, 1, 1, 1, 1], max_tokens=8)
    engine.step()
    assert engine["a"].blocks[:2] == engine["b"].blocks[:2] == engine["c"].blocks[:2]
    assert [engine.step()[0][0] for _ in range(6)] == ["a"] * 6
    assert list(engine.ended) == ["a"]
    engine.finish()
    assert engine.ended == dict.fromkeys("abc", ideal([1] * 5, 8))


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_a_step_that_failed_may_be_asked_for_again_and_begins_nothing_twice(before: int) -> None:
    engine = Engine(capacity=3, budget=4)
    for key, prompt in {"a": 6, "b": 1, "c": 5}.items():
        engine.ask(key, range(prompt), max_tokens=4)
    engine.steps(before)
    failed = engine.scheduler.next_batch()
    engine.table.fail(failed)
    again = engine.scheduler.next_batch()
    assert again == [part._replace(begins=False) for part in failed]
    engine.run(again)
    engine.finish()
    assert engine.ended == {key: ideal(engine[key].request.prompt_ids, 4) for key in "abc"}


def test_with_less_memory_the_youngest_goes_back_in_line_and_so_many_run_from_now_on() -> None:
    engine = Engine(capacity=8)
    for key in "abc":
        engine.ask(key, range(3), max_tokens=9)
    engine.steps(2)
    engine.ask("d", range(3), max_tokens=9)
    assert engine.scheduler.run_one_less()
    assert engine.where == (["a", "b"], ["c", "d"])
    engine.steps(2)
    assert (engine.where, engine.scheduler.capacity) == ((["a", "b"], ["c", "d"]), 2)
    assert engine.scheduler.run_one_less()
    assert not engine.scheduler.run_one_less()
    assert (engine.where, engine.scheduler.capacity) == ((["a"], ["b", "c", "d"]), 1)
    engine.finish()
    assert engine.ended == dict.fromkeys("abcd", ideal(range(3), 9))


def wishes(prompt: int, max_tokens: int) -> st.SearchStrategy[tuple[list[int], int]]:
    ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=prompt)
    return st.tuples(ids, st.integers(1, max_tokens))


shapes = {"capacity": st.integers(1, 5), "size": st.integers(1, 5), "spare": st.integers(0, 12), "reuse": st.booleans()}


def asked(wishes: list[tuple[list[int], int]], spare: int, size: int, **shape: object) -> Engine:
    """An engine with `spare` blocks more than the largest request needs, and all requests in its line."""
    most = max(len(prompt) + max_tokens - 1 for prompt, max_tokens in wishes)
    engine = Engine(blocks=-(-most // size) + spare, size=size, **shape)  # type: ignore[arg-type]
    for key, (prompt, max_tokens) in enumerate(wishes):
        assert engine.ask(key, prompt, max_tokens) is None
    return engine


@settings(deadline=None)
@given(st.lists(wishes(20, 12), min_size=1, max_size=8), st.integers(1, 12), st.fixed_dictionaries(shapes))
def test_everyone_gets_the_ideal_text_in_no_more_steps_than_there_are_tokens(
    wishes: list[tuple[list[int], int]], budget: int, shape: dict[str, int]
) -> None:
    engine = asked(wishes, budget=budget, **shape)
    # The oldest is never preempted and goes forward in every step; who becomes the oldest has at worst all to compute.
    assert engine.finish() <= sum(sequence.request.most_tokens for sequence in engine.sequences.values())
    assert engine.ended == {key: ideal(prompt, max_tokens) for key, (prompt, max_tokens) in enumerate(wishes)}
    assert engine.pool.free == engine.pool.count


@settings(deadline=None)
@given(
    st.lists(wishes(20, 12), min_size=1, max_size=8), st.integers(1, 64), st.floats(0.01, 100), st.fixed_dictionaries(shapes)
)
def test_with_measured_pacing_too_everyone_comes_to_an_end(
    wishes: list[tuple[list[int], int]], largest: int, token_cost: float, shape: dict[str, int]
) -> None:
    pacing = Pacing(largest)
    engine = asked(wishes, budget=pacing, **shape)
    # One step in so many carries no prompt, and the first beside streams.
    tokens = sum(sequence.request.most_tokens for sequence in engine.sequences.values())
    for _ in range(tokens + tokens // STALE + 1):
        batch = engine.scheduler.next_batch()
        decoding = sum(part.decodes for part in batch)
        prefilled = sum(part.stop - part.start for part in batch) - decoding
        engine.run(batch)
        if batch:
            pacing.measured(decoding, prefilled, 1 + token_cost * prefilled)
    assert engine.ended == {key: ideal(prompt, max_tokens) for key, (prompt, max_tokens) in enumerate(wishes)}


class Service(RuleBasedStateMachine):
    """Requests of all kinds come, are stopped, time out, fail for want of memory, give way, and end."""

    @initialize(
        capacity=st.integers(2, 4),
        tokens=st.integers(16, 30),
        size=st.integers(1, 4),
        line=st.integers(3, 6),
        reuse=st.booleans(),
    )
    def make(self, capacity: int, tokens: int, size: int, line: int, reuse: bool) -> None:
        self.engine = Engine(capacity, tokens // size, size, 8, line, reuse)
        self.scheduler, self.pool = self.engine.scheduler, self.engine.pool
        self.capacity, self.line, self.reuse = capacity, line, reuse
        self.open: dict[int, Sequence] = {}
        self.begun: list[int] = []
        self.told: dict[int, int] = {}
        self.now = 0

    @rule(data=st.data(), wishes=st.lists(wishes(6, 10), min_size=1, max_size=5), deadline=st.none() | st.integers(3, 20))
    def come(self, data: st.DataObject, wishes: list[tuple[list[int], int]], deadline: int | None) -> None:
        """Begin like an earlier text, or not."""
        for tail, max_tokens in wishes:
            key = len(self.engine.sequences)
            earlier = self.engine.sequences[data.draw(st.integers(0, key - 1))].token_ids if key else []
            prompt = earlier[: data.draw(st.integers(0, min(len(earlier), 8)))] + tail
            self.come_with(GenerationRequest(key, tuple(prompt), max_tokens, deadline=deadline and self.now + deadline))

    def come_with(self, request: GenerationRequest) -> None:
        fits = len(request.prompt_ids) + request.max_tokens - 1 <= self.pool.count * self.pool.block_size
        assert self.scheduler.can_ever_run(request) == fits
        if fits:
            full = len(self.open) >= self.line + self.capacity
            assert self.engine.add(request) == (request.key if full else None)
            if not full:
                self.open[request.key] = self.engine[request.key]

    @rule(data=st.data(), all=st.integers(0, 5).map(lambda n: not n))
    def cancel(self, data: st.DataObject, all: bool) -> None:
        keys = list(self.open) if all else [data.draw(st.integers(0, len(self.engine.sequences)))]
        for key in keys:
            if self.open.pop(key, None):
                self.engine.end(key)
            assert self.scheduler.remove(key) is None

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        due = {key for key, s in self.open.items() if s.request.deadline is not None and s.request.deadline <= self.now}
        expired = self.scheduler.expired(self.now)
        assert len(expired) == len(due)
        assert set(expired) == due
        for key in expired:
            del self.open[key]
            self.engine.end(key)

    def move(self) -> None:
        places = {key: place for place, key in enumerate(self.engine.where[1], 1) if key not in self.begun}
        moved = self.scheduler.moved()
        assert moved == [(key, place) for key, place in places.items() if self.told.get(key) != place]
        self.told.update(moved)

    @rule(for_ever=st.booleans())
    def spare_memory(self, for_ever: bool) -> None:
        running, waiting = self.engine.where
        assert self.scheduler.run_one_less() == (len(running) > 1)
        if len(running) > 1:
            self.capacity = len(running) - 1
            assert self.engine.where == (running[:-1], [running[-1], *waiting])
        if not for_ever:
            self.scheduler.capacity = self.capacity = 4

    @rule()
    def fail(self) -> None:
        """Run out of memory in a step: it never was, whatever it wrote."""
        self.engine.table.fail(self.next_batch())

    @rule(count=st.integers(1, 6), budget=st.integers(0, 12))
    def step(self, count: int, budget: int) -> None:
        self.engine.pacing.largest = budget
        for _ in range(count):
            batch = self.next_batch()
            self.move()
            self.engine.run(batch)
            for key in self.open.keys() & self.engine.ended.keys():
                request = self.open.pop(key).request
                assert self.engine.ended[key] == ideal(request.prompt_ids, request.max_tokens)

    def next_batch(self) -> list[Slice]:
        before = {sequence: sequence.computed for sequence in self.scheduler.running.values()}
        streams = [
            sequence
            for sequence in before
            if sequence.completion_tokens and sequence.computed == len(sequence.token_ids) - 1
        ]
        short = sum(len(s.blocks) * self.pool.block_size < len(s.token_ids) for s in streams) - self.pool.free
        batch = self.scheduler.next_batch()
        assert bool(batch) == bool(self.open)
        running = list(self.scheduler.running.values())
        taken = [part.sequence for part in batch]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(running)
        stayed = [s for s in before if s in running and s.computed == before[s]]
        assert len(stayed) == len(before) or short > 0, "it was preempted without need"
        assert set(taken) >= set(stayed) & set(streams), "a stream was left out"
        for part in batch:
            self.check_writes(part)
            tokens = min(len(part.sequence.token_ids) + (part.sequence not in stayed), part.sequence.request.most_tokens)
            assert len(part.sequence.blocks) >= self.pool.blocks_for(tokens), "it has no room for its next token"
        self.check_order(batch)
        self.check_budget(batch)
        return batch

    def check_writes(self, part: Slice) -> None:
        """What a slice writes belongs to its sequence alone, and what it may look at was computed for these very tokens."""
        size, blocks = self.pool.block_size, part.sequence.blocks
        assert part.start == part.sequence.computed < part.stop <= min(len(part.sequence.token_ids), len(blocks) * size)
        written = set(blocks[part.start // size : self.pool.blocks_for(part.stop)])
        others = [other for other in self.scheduler.running.values() if other is not part.sequence]
        assert written.isdisjoint(block for other in others for block in other.blocks)
        assert self.engine.table.held(blocks, part.start) == entries(part.sequence.token_ids[: part.start])

    def check_order(self, batch: list[Slice]) -> None:
        """Streams come first; then prompts in the order in which their requests came, only the last of them cut."""
        streams, prompts = self.parted(batch)
        assert all(part.decodes for part in streams)
        keys = [part.sequence.request.key for part in prompts]
        assert keys == sorted(keys)
        assert all(part.samples for part in prompts[:-1])
        for part in batch:
            assert part.begins == (part.sequence.request.key not in self.begun)
            if part.begins:
                assert part.sequence.cached_tokens == part.start
                self.begun.append(part.sequence.request.key)

    def check_budget(self, batch: list[Slice]) -> None:
        """No step carries more prompt than it may, nor less than it could."""
        streams, prompts = self.parted(batch)
        left = self.engine.pacing.prefill_budget(len(streams)) - sum(part.stop - part.start for part in prompts)
        assert left >= 0
        if left:
            assert len(batch) == len(self.scheduler.running)
        if left and self.scheduler.waiting and len(self.scheduler.running) < self.capacity:
            assert not self.fits(next(iter(self.scheduler.waiting)))

    def parted(self, batch: list[Slice]) -> tuple[list[Slice], list[Slice]]:
        """Part the streams, of which pacing was told, from what was computed on its budget."""
        return batch[: self.engine.pacing.decoding], batch[self.engine.pacing.decoding :]

    def fits(self, sequence: Sequence) -> bool:
        """Whether the cache has room for a sequence and its next token, if it will be computed."""
        tokens = min(len(sequence.token_ids) + 1, sequence.request.most_tokens)
        used = {block for other in self.scheduler.running.values() for block in other.blocks}
        shared = used.intersection(findable(self.pool, sequence.token_ids[:-1])) if self.reuse else set()
        return self.pool.blocks_for(tokens) - len(shared) <= self.pool.free

    @invariant()
    def what_can_be_found_is_what_it_is_found_for(self) -> None:
        for sequence in self.engine.sequences.values():
            blocks = findable(self.pool, sequence.token_ids)
            tokens = len(blocks) * self.pool.block_size
            assert self.engine.table.held(blocks, tokens) == entries(sequence.token_ids[:tokens])

    @invariant()
    def every_request_is_running_or_waiting_or_ended_and_nobody_overtakes(self) -> None:
        running, waiting = self.engine.where
        assert running + waiting == sorted(self.open)
        assert self.engine.sequences.keys() == self.open.keys() | self.engine.ended.keys()
        assert len(running) <= self.capacity == self.scheduler.capacity
        assert self.begun == sorted(set(self.begun))
        assert self.scheduler.idle == (not self.open)

    @invariant()
    def every_block_is_free_or_of_a_running_sequence(self) -> None:
        used = {block for sequence in self.scheduler.running.values() for block in sequence.blocks}
        assert len(used) + self.pool.free == self.pool.count
        assert all(len(set(s.blocks)) == len(s.blocks) for s in self.scheduler.running.values())
        assert not any(sequence.blocks for sequence in self.scheduler.waiting)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.step(sum(sequence.request.most_tokens for sequence in self.open.values()), budget=1)
            assert self.scheduler.idle
            assert self.pool.free == self.pool.count


Service.TestCase.settings = settings(
    deadline=None, max_examples=80, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
TestService = Service.TestCase
