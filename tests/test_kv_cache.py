"""The block pool against a model that keeps what every block holds, and when it was last let go of."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from LLM.engine.kv_cache import ROOT, BlockPool, Hash, chain, root

SIZE = 2
Text = tuple[int, ...]

texts = st.lists(st.integers(0, 1), max_size=12).map(tuple)


def hashes(text: Text, size: int = SIZE) -> list[Hash]:
    """Hash a text's full blocks."""
    full = [text[i : i + size] for i in range(0, len(text) - size + 1, size)]
    return list(itertools.accumulate(full, chain, initial=ROOT))[1:]


def filled(pool: BlockPool, text: Text) -> list[int]:
    """Use as many blocks as a text has full ones, and make them findable."""
    blocks = pool.take(len(text) // SIZE)
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes(text), strict=True):
        pool.remember(block, block_hash)
    return blocks


def found(pool: BlockPool, text: Text) -> list[int]:
    return pool.find(hashes(text))


@given(texts, texts)
def test_two_blocks_have_one_hash_exactly_if_their_texts_are_the_same_from_the_start(one: Text, other: Text) -> None:
    for i, j in itertools.product(range(len(one) // SIZE), range(len(other) // SIZE)):
        same = one[: (i + 1) * SIZE] == other[: (j + 1) * SIZE]
        assert (hashes(one)[i] == hashes(other)[j]) == same


@pytest.mark.parametrize("ids", [(1, 2), (2, 1), (258, 0), (1, 1 << 40), (0, (1 << 64) - 1)])
def test_a_hash_tells_ids_of_any_size_and_order_apart(ids: Text) -> None:
    others = {(1, 2), (2, 1), (258, 0), (2, 256), (1, 1 << 40), (0, (1 << 64) - 1)} - {ids}
    assert chain(ROOT, ids) == chain(ROOT, list(ids))
    assert chain(ROOT, ids) not in {chain(ROOT, other) for other in others}
    assert chain(chain(ROOT, ids), ids) != chain(ROOT, ids + ids)


@given(st.text(max_size=3), st.text(max_size=3), texts.filter(lambda text: len(text) >= SIZE))
def test_sequences_of_two_scopes_share_no_block_and_those_of_one_do(one: str, other: str, text: Text) -> None:
    block = text[:SIZE]
    assert (chain(root(one), block) == chain(root(other), block)) == (one == other)
    assert chain(root(one), block) != chain(chain(root(other), block), block)


@pytest.mark.parametrize(
    ("size", "tokens", "blocks"), [(4, 0, 0), (4, 1, 1), (4, 4, 1), (4, 5, 2), (1, 5, 5), (16, 4096, 256)]
)
def test_a_block_begun_is_a_block_used(size: int, tokens: int, blocks: int) -> None:
    assert BlockPool(1, size).blocks_for(tokens) == blocks


def test_more_blocks_than_are_free_cannot_be_taken_and_then_none_are() -> None:
    pool = BlockPool(3, SIZE)
    text = (1, 1)
    pool.release(filled(pool, text))
    assert pool.take(4) is None
    assert (pool.free, len(found(pool, text))) == (3, 1)
    assert sorted(pool.take(3) or []) == [0, 1, 2]
    assert (pool.free, pool.take(1), pool.take(0)) == (0, None, [])


def test_blocks_without_content_are_taken_first_then_the_longest_unused_and_of_a_text_its_end_first() -> None:
    pool = BlockPool(7, SIZE)
    first, second = (1, 2, 3, 4, 5, 6), (7, 8, 9, 0)
    a, b = filled(pool, first), filled(pool, second)
    unfilled = pool.take(1)
    pool.release(a)
    pool.release(b)
    pool.release(unfilled or [])
    taken = [pool.take(1) for _ in range(7)]
    assert taken[2:] == [[block] for block in (a[2], a[1], a[0], b[1], b[0])]
    assert unfilled in taken[:2]


def test_what_is_used_again_is_forgotten_last() -> None:
    pool = BlockPool(2, SIZE)
    a, b = filled(pool, (1, 1)), filled(pool, (2, 2))
    pool.release(a)
    pool.release(b)
    pool.share(a)
    pool.release(a)
    assert pool.take(1) == b
    assert (found(pool, (1, 1)), found(pool, (2, 2))) == (a, [])


def test_what_came_after_a_taken_block_is_found_again_once_its_beginning_is() -> None:
    pool = BlockPool(2, SIZE)
    text = (1, 1, 2, 2)
    one, two = filled(pool, text)
    pool.release([one])  # against the rule, so that the beginning goes first
    pool.release([two])
    assert pool.take(1) == [one]
    assert found(pool, text) == []
    pool.remember(one, hashes(text)[0])
    assert found(pool, text) == [one, two]


def test_a_block_that_several_use_is_free_when_the_last_lets_go_and_found_all_the_while() -> None:
    pool = BlockPool(1, SIZE)
    blocks = filled(pool, (1, 1))
    pool.share(blocks)
    pool.share(blocks)
    for users_left in (2, 1, 0):
        assert found(pool, (1, 1)) == blocks
        assert pool.take(1) is None
        pool.release(blocks)
        assert pool.free == (users_left == 0)
    assert pool.take(1) == blocks


def test_of_two_blocks_with_the_same_content_the_first_is_found_and_the_other_is_as_good_as_empty() -> None:
    pool = BlockPool(3, SIZE)
    first, second = filled(pool, (1, 1)), filled(pool, (1, 1))
    other = filled(pool, (2, 2))
    for blocks in (other, first, second):
        pool.release(blocks)
    assert found(pool, (1, 1)) == first
    assert [pool.take(1) for _ in range(3)] == [second, other, first]
    assert found(pool, (1, 1)) == []
    pool.remember(second[0], chain(ROOT, (1, 1)))
    assert found(pool, (1, 1)) == second


def test_of_a_sequence_that_went_wrong_nothing_is_found_while_others_keep_theirs() -> None:
    pool = BlockPool(4, SIZE)
    wrong, right = filled(pool, (1, 1, 2, 2)), filled(pool, (3, 3))
    pool.forget([*wrong, *(pool.take(1) or [])])
    assert (found(pool, (1, 1, 2, 2)), found(pool, (3, 3))) == ([], right)
    pool.release(wrong)
    pool.release(right)
    assert [pool.take(1) for _ in range(3)] == [[wrong[0]], [wrong[1]], right], "empty ones first"


def test_no_hash_is_asked_for_after_one_that_is_not_known() -> None:
    pool = BlockPool(4, SIZE)
    filled(pool, (1, 1, 2, 2))
    asked = iter(hashes((1, 1, 9, 9, 2, 2, 3, 3)))
    assert len(pool.find(asked)) == 1
    assert len(list(asked)) == 2


def test_what_is_forgotten_while_in_use_stays_in_use_and_can_be_remembered_anew() -> None:
    pool = BlockPool(2, SIZE)
    used, free = filled(pool, (1, 1)), filled(pool, (2, 2))
    pool.release(free)
    pool.forget(range(2))
    assert found(pool, (1, 1)) == found(pool, (2, 2)) == []
    assert (pool.free, pool.take(1), pool.take(1)) == (1, free, None)
    pool.remember(used[0], chain(ROOT, (3, 3)))
    pool.release(used)
    assert found(pool, (3, 3)) == used


@dataclass(eq=False)
class Holder:
    """Somebody who uses the blocks of a text, of which the first `written` are full."""

    text: Text
    blocks: list[int]
    written: int
    hashes: list[Hash] = field(init=False)

    def __post_init__(self) -> None:
        self.hashes = hashes(self.text)


class Pool(RuleBasedStateMachine):
    """Texts come, share what is found, are written block by block, and go; the pool must say what the model says."""

    @initialize(count=st.integers(3, 12))
    def make(self, count: int) -> None:
        self.pool = BlockPool(count, SIZE)
        self.holders: list[Holder] = []
        self.holds: dict[int, Text] = {}  # the text up to a block's end, for those that are to be found
        self.released: dict[int, int] = dict.fromkeys(range(count), 0)  # when each free block was last let go of
        self.clock = 0

    @rule(text=texts)
    def come(self, text: Text) -> None:
        places = {held: block for block, held in self.holds.items()}
        prefixes = [text[:end] for end in range(SIZE, len(text) + 1, SIZE)]
        expected = [places[prefix] for prefix in itertools.takewhile(places.__contains__, prefixes)]
        shared = found(self.pool, text)
        assert shared == expected
        self.pool.share(shared)
        for block in shared:
            self.released.pop(block, None)
        wanted = self.pool.blocks_for(len(text)) - len(shared)
        fresh = self.pool.take(wanted)
        assert (fresh is None) == (wanted > len(self.released))
        self._take(fresh or [])
        self.holders.append(Holder(text, shared + (fresh or []), len(shared)))

    def _take(self, taken: list[int]) -> None:
        for block in taken:
            rest = self.released.keys() - {block}
            if block in self.holds:
                assert rest <= self.holds.keys(), "an empty block was passed over"
                assert all(self.released[block] < self.released[other] for other in rest)
                del self.holds[block]
            del self.released[block]  # fails if somebody uses it

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), most=st.integers(1, 6))
    def write(self, data: st.DataObject, most: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        for index in range(holder.written, min(holder.written + most, len(holder.hashes), len(holder.blocks))):
            block, text = holder.blocks[index], holder.text[: (index + 1) * SIZE]
            self.pool.remember(block, holder.hashes[index])
            holder.written += 1
            if text not in self.holds.values():
                self.holds[block] = text

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.pool.release(holder.blocks)
        used = {block for other in self.holders for block in other.blocks}
        for block in reversed(holder.blocks):
            if block not in used:
                self.clock += 1
                self.released[block] = self.clock

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), all=st.integers(0, 3))
    def forget(self, data: st.DataObject, all: int) -> None:
        blocks = list(range(self.pool.count)) if all == 3 else data.draw(st.sampled_from(self.holders)).blocks
        self.pool.forget(blocks)
        for block in blocks:
            self.holds.pop(block, None)

    @invariant()
    def every_block_is_free_or_used(self) -> None:
        used = {block for holder in self.holders for block in holder.blocks}
        assert used.isdisjoint(self.released)
        assert len(used) + self.pool.free == self.pool.count
        assert self.pool.free == len(self.released)

    @invariant()
    def what_is_found_holds_what_it_is_found_for(self) -> None:
        for holder in self.holders:
            for end, block in enumerate(found(self.pool, holder.text), 1):
                assert self.holds[block] == holder.text[: end * SIZE]


Pool.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestPool = Pool.TestCase
