"""Which request goes forward where several owners ask: over places, blocks, prompts and users. Steps, no clock."""

from collections import Counter
from collections.abc import Hashable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLM.engine.request import GenerationRequest
from LLM.engine.scheduler import QUANTUM, Scheduler
from LLM.engine.sequence import Slice
from tests.test_scheduler import Engine, ideal

ENDLESS = 5000


class Shared(Engine):
    """An engine whose every request is of an owner, and that counts the tokens each was served."""

    def __init__(
        self, capacity: int, per_owner: int | None = None, blocks: int = 4096, size: int = 4, budget: int = 64
    ) -> None:
        super().__init__(capacity, blocks, size, budget)
        self.scheduler = Scheduler(capacity, self.pool, self.pacing, 256, per_owner=per_owner)
        self.served: Counter[Hashable] = Counter()
        self.begun: list[Hashable] = []

    def want(
        self, owner: Hashable, count: int = 1, prompt: int = 3, max_tokens: int = ENDLESS, user: Hashable = None
    ) -> None:
        for _ in range(count):
            key = (owner, user, len(self.sequences))
            ids = tuple(len(self.sequences) * 100_000 + i for i in range(prompt))
            self.add(GenerationRequest(key, ids, max_tokens, owner=owner, user=user))

    def run(self, batch: list[Slice]) -> None:
        for part in batch:
            self.served[part.sequence.request.owner] += part.stop - part.start
            if part.begins:
                self.begun.append(part.sequence.request.key)
        super().run(batch)

    def running(self) -> Counter[Hashable]:
        return Counter(s.request.owner for s in self.scheduler.running.values())


def test_eight_endless_answers_of_one_client_leave_another_its_first_token_within_a_few_steps() -> None:
    engine = Shared(8)
    engine.want("heavy", 8)
    engine.steps(50)
    assert engine.running() == {"heavy": 8}, "it may have all places while it is alone"
    engine.want("light")
    engine.steps(2)
    assert engine.running() == {"heavy": 7, "light": 1}
    assert engine["light", None, 8].completion_tokens >= 1


def test_who_has_few_places_gets_half_of_them_and_not_more() -> None:
    engine = Shared(8)
    engine.want("heavy", 20)
    engine.steps(50)
    engine.want("light", 6)
    engine.steps(10)
    assert engine.running() == {"heavy": 4, "light": 4}


@pytest.mark.parametrize(("per_owner", "places"), [(1, {"a": 6, "b": 1, "c": 1}), (3, {"a": 6, "b": 1, "c": 1})])
def test_the_limit_holds_only_as_long_as_others_wait(per_owner: int, places: dict[str, int]) -> None:
    engine = Shared(8, per_owner)
    engine.want("a", 20)
    engine.want("b")
    engine.want("c")
    engine.steps(3)
    assert engine.running() == places
    engine.want("d", 8)
    engine.steps(8)
    assert engine.running()["a"] == max(per_owner, 8 - 2 - per_owner)


def test_a_paused_answer_goes_on_first_of_its_owners_and_tells_no_second_beginning() -> None:
    engine = Shared(2)
    engine.want("heavy", 3, max_tokens=60)
    engine.steps(5)
    engine.want("light", max_tokens=5)
    engine.finish()
    assert [key[0::2] for key in engine.begun] == [("heavy", 0), ("heavy", 1), ("light", 3), ("heavy", 2)]  # type: ignore[index]
    assert engine.ended == {key: ideal(s.request.prompt_ids, s.request.max_tokens) for key, s in engine.sequences.items()}


def test_in_one_place_two_endless_answers_change_only_after_a_quantum() -> None:
    engine = Shared(1)
    engine.want("a")
    engine.want("b")
    turns = []
    for _ in range(20 * QUANTUM):
        (owner,) = {key[0] for key, *_ in engine.step()}  # type: ignore[index]
        turns.append(owner)
    changes = sum(x != y for x, y in pairwise(turns))
    assert 4 <= changes <= 20
    assert abs(engine.served["a"] - engine.served["b"]) <= 2 * QUANTUM


def test_fifty_requests_of_one_owner_put_anothers_first_in_line() -> None:
    engine = Shared(1)
    engine.want("heavy", 50, max_tokens=40)
    engine.steps(3)
    engine.scheduler.moved()
    engine.want("light", max_tokens=4)
    assert dict(engine.scheduler.moved())["light", None, 50] == 1
    while not any(key[0] == "light" for key in engine.begun):  # type: ignore[index]
        engine.step()
    assert len(engine.begun) <= 3


def test_one_key_is_shared_between_its_users_and_counts_as_one_client() -> None:
    engine = Shared(8)
    engine.want("key", 8, user="greedy")
    engine.steps(20)
    engine.want("key", user="modest")
    engine.want("other")
    engine.steps(4)
    assert engine.running() == {"key": 7, "other": 1}
    assert Counter(s.request.user for s in engine.scheduler.running.values()) == {"greedy": 6, "modest": 1, None: 1}


def test_a_short_prompt_goes_before_the_rest_of_anothers_long_ones() -> None:
    engine = Shared(8, budget=8)
    engine.want("long", 3, prompt=400, max_tokens=4)
    engine.steps(10)
    engine.want("short", prompt=6, max_tokens=4)
    assert ("short", None, 3) in {key for key, *_ in engine.step()}
    assert len(engine.ended) == 0


def test_cached_prompts_and_what_is_computed_again_after_a_pause_cost_their_owner_nothing() -> None:
    engine = Shared(2, budget=500)
    queue = engine.scheduler.waiting
    cost = []
    for key in ("first", "again"):
        engine.add(GenerationRequest(key, tuple(range(400)), 500, owner=key))
        before = queue.served(engine[key])[0]
        engine.steps(2)
        cost.append(queue.served(engine[key])[0] - before)
    assert cost[0] >= 400
    assert cost[1] <= engine.pool.block_size + 1, "what of it was not found, and a token"
    served = queue.served(engine["again"])
    engine.scheduler._preempt(engine["again"])
    engine.pool.forget(range(engine.pool.count))
    engine.steps(1)
    assert queue.served(engine["again"]) == tuple(tokens + 1 for tokens in served), "the token sampled last alone is new"


def test_blocks_that_run_out_are_given_up_by_who_was_served_most_and_not_by_who_came_last() -> None:
    engine = Shared(4, blocks=40, size=4)
    engine.want("heavy", 2, prompt=40, max_tokens=60)
    engine.steps(20)
    engine.want("light", prompt=12, max_tokens=40)
    engine.steps(2)
    assert "light" in engine.running()
    while engine.running()["heavy"] == 2:
        engine.step()
    assert "light" in engine.running()
    engine.finish()
    assert engine.ended == {key: ideal(s.request.prompt_ids, s.request.max_tokens) for key, s in engine.sequences.items()}
    assert engine.pool.free == engine.pool.count


@settings(deadline=None, max_examples=30)
@given(
    capacity=st.integers(1, 6),
    lengths=st.tuples(*[st.tuples(st.integers(1, 30), st.integers(1, 30))] * 2),
    others=st.lists(st.tuples(st.integers(0, 200), st.sampled_from("cd"), st.integers(1, 40)), max_size=10),
)
def test_two_that_always_wait_are_served_alike_whatever_they_ask_and_others_do(
    capacity: int, lengths: tuple[tuple[int, int], tuple[int, int]], others: list[tuple[int, str, int]]
) -> None:
    engine = Shared(capacity, per_owner=capacity)  # or the places decide, of which each has its half
    for step in range(400):
        for owner, (prompt, answer) in zip("ab", lengths, strict=True):
            lacking = 2 * capacity - sum(key[0] == owner for key in engine.scheduler.keys)  # type: ignore[index]
            engine.want(owner, lacking, prompt, answer)
        for at, owner, length in others:
            if at == step:
                engine.want(owner, 1, length, length)
        engine.step()
    # What each may have running when the other one has just caught up, and a quantum.
    bound = capacity * max(map(sum, lengths)) + QUANTUM
    assert abs(engine.served["a"] - engine.served["b"]) <= bound
    done = {key[2] for key in engine.ended}  # type: ignore[index]
    late = [s.request.key for s in engine.sequences.values() if s.request.owner in "cd" and s.request.key[2] not in done]  # type: ignore[index]
    assert not late or max(at for at, *_ in others) > 100, "nobody starves"


@settings(deadline=None, max_examples=60)
@given(
    capacity=st.integers(1, 4),
    spare=st.integers(0, 10),
    wants=st.lists(
        st.tuples(
            st.integers(0, 30), st.sampled_from("abc"), st.sampled_from("xy"), st.integers(1, 20), st.integers(1, 300)
        ),
        min_size=1,
        max_size=10,
    ),
)
def test_whatever_comes_when_all_end_with_their_exact_texts_and_no_block_is_lost(
    capacity: int, spare: int, wants: list[tuple[int, str, str, int, int]]
) -> None:
    most = max(prompt + answer for *_, prompt, answer in wants)
    engine = Shared(capacity, blocks=-(-most // 4) + spare, budget=16)
    for step in range(20 * sum(prompt + answer for *_, prompt, answer in wants) + 60):
        for at, owner, user, prompt, answer in wants:
            if at == step:
                engine.want(owner, 1, prompt, answer, user)
        if step > 30 and engine.scheduler.idle:
            break
        engine.step()
    assert engine.ended == {key: ideal(s.request.prompt_ids, s.request.max_tokens) for key, s in engine.sequences.items()}
    assert len(engine.ended) == len(wants)
    assert engine.pool.free == engine.pool.count
