"""Attention over the paged cache against attention over each sequence alone, in random packed steps.

Every place of the cache holds a NaN until it is written: one that is read without need spoils the result.
"""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from LLM.engine.attention import PagedCache, Row, Step, paged_attention

BLOCKS, BLOCK_SIZE = 90, 4
MODULE: Any = SimpleNamespace(layer_idx=3)
Chunks = list[tuple[int, int]]  # of a step: which sequence goes forward, and by how many tokens


@dataclass(frozen=True)
class Case:
    """What one layer of a model may ask for."""

    heads: int = 6
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float64
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    error: float = 1e-12


CASES = {
    "heads of their own": Case(heads=4, kv_heads=4),
    "grouped heads": Case(),
    "one kv head": Case(kv_heads=1),
    "values narrower than keys": Case(dim=12, value_dim=5),
    "an explicit scaling": Case(scaling=0.7),
    "a window of one token": Case(window=1),
    "a window smaller than a block": Case(window=3),
    "a window larger than a chunk": Case(window=11),
    "a window larger than every sequence": Case(window=1000),
    "soft-capped scores": Case(softcap=1.5, error=1e-6),
    "everything at once": Case(scaling=1.3, window=7, softcap=2.0, error=1e-6),
    "float32": Case(dtype=torch.float32, error=1e-5),
    "float32, everything at once": Case(dtype=torch.float32, scaling=1.3, window=7, softcap=2.0, error=1e-5),
    "bfloat16": Case(dtype=torch.bfloat16, error=3e-2),
}


@pytest.fixture(autouse=True)
def _inference_on_one_thread():
    # These tensors are so small that two threads do nothing but wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


class Sequences:
    """Sequences of random queries, keys and values, whose beginnings lie in scattered blocks of one cache."""

    def __init__(self, case: Case, count: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.case = case
        length = BLOCKS * BLOCK_SIZE // count
        shapes = [(case.heads, case.dim), (case.kv_heads, case.dim), (case.kv_heads, case.value_dim)]
        self.query, self.key, self.value = (torch.randn(count, length, *shape).to(case.dtype) for shape in shapes)
        self.done = [0] * count
        self.blocks: list[list[int]] = [[] for _ in range(count)]
        self.free = random.Random(seed).sample(range(BLOCKS), BLOCKS)
        self.cache = PagedCache(BLOCKS, BLOCK_SIZE)
        for tensor in self.cache.layer(MODULE.layer_idx, self.key[0], self.value[0], case.window):
            tensor.fill_(torch.nan)

    def forward(self, chunks: Chunks) -> list[Tensor]:
        """Take each sequence so many tokens further, all in one step; give its attention [tokens, heads, dimension]."""
        rows, slots, first = [], [], 0
        spans = [slice(self.done[sequence], self.done[sequence] + tokens) for sequence, tokens in chunks]
        for (sequence, tokens), span in zip(chunks, spans, strict=True):
            blocks = self.blocks[sequence]
            while len(blocks) * BLOCK_SIZE < span.stop:
                blocks.append(self.free.pop())
            slots += [blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(span.start, span.stop)]
            rows.append(Row(first, first + tokens, span.stop, torch.tensor(blocks)))
            first, self.done[sequence] = first + tokens, span.stop
        packed = [
            torch.cat([t[sequence, span] for (sequence, _), span in zip(chunks, spans, strict=True)]).transpose(0, 1)[None]
            for t in (self.query, self.key, self.value)
        ]
        case, step = self.case, Step(self.cache, torch.tensor(slots), tuple(rows))
        output, weights = paged_attention(
            MODULE, *packed, None, case.scaling, case.window, case.softcap, step, dropout=0.0, position_ids=None
        )
        assert weights is None
        assert output.shape == (1, first, case.heads, case.value_dim)
        return [output[0, row.first : row.last] for row in rows]

    def alone(self, sequence: int, tokens: int) -> Tensor:
        """Give the attention of the newest tokens of one sequence by its definition, in float64."""
        case, length = self.case, self.done[sequence]
        query = self.query[sequence, length - tokens : length].double().transpose(0, 1)
        key, value = (t[sequence, :length].double().transpose(0, 1) for t in (self.key, self.value))
        key, value = (t.repeat_interleave(case.heads // case.kv_heads, 0) for t in (key, value))
        back = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
        seen = (back >= 0) & (back < (case.window or length))
        if case.softcap is None:
            return scaled_dot_product_attention(query, key, value, seen, scale=case.scaling).transpose(0, 1)
        scores = query @ key.transpose(-1, -2) * (case.scaling or case.dim**-0.5)
        capped = case.softcap * torch.tanh(scores / case.softcap)
        return (capped.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1)


def random_steps(seed: int, sequences: int, length: int) -> list[Chunks]:
    """Make steps of some of the sequences, in any order, some by one token and some by a chunk of any size."""
    draw, left, steps = random.Random(seed), [length] * sequences, []
    while any(left):
        able = [sequence for sequence in range(sequences) if left[sequence]]
        chosen = draw.sample(able, draw.randint(1, len(able)))
        step = [(sequence, min(left[sequence], draw.choice([1, 1, 2, 5, 16, 40]))) for sequence in chosen]
        for sequence, tokens in step:
            left[sequence] -= tokens
        steps.append(step)
    return steps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_row_of_a_packed_step_is_what_its_sequence_gives_alone(case: Case, seed: int):
    sequences = Sequences(case, 5, seed)
    steps = random_steps(seed, 5, 71)
    assert any({1} < {tokens for _, tokens in step} for step in steps), "some step decodes and prefills"
    for step in steps:
        for (sequence, tokens), row in zip(step, sequences.forward(step), strict=True):
            torch.testing.assert_close(row.double(), sequences.alone(sequence, tokens), atol=case.error, rtol=case.error)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 29, 64])
def test_the_size_of_the_chunks_does_not_matter(chunk: int, window: int | None):
    case = Case(window=window)
    whole, chunked = Sequences(case, 1, 0), Sequences(case, 1, 0)
    rows = [row for start in range(0, 64, chunk) for row in chunked.forward([(0, min(chunk, 64 - start))])]
    torch.testing.assert_close(torch.cat(rows), whole.forward([(0, 64)])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", [CASES["float32"], CASES["float32, everything at once"]])
def test_neighbours_in_a_step_change_nothing_beyond_rounding(case: Case):
    packed, apart = Sequences(case, 5, 1), Sequences(case, 5, 1)
    for step in random_steps(1, 5, 71):
        for chunk, row in zip(step, packed.forward(step), strict=True):
            torch.testing.assert_close(row, apart.forward([chunk])[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_streams_of_very_different_lengths_decode_together(case: Case):
    sequences, lengths = Sequences(case, 6, 2), [1, 50, 3, 24, 25, 2]
    sequences.forward([(sequence, length) for sequence, length in enumerate(lengths)])
    for together in ([4, 0, 3, 1, 5, 2], [5, 0], [1]):
        rows = sequences.forward([(sequence, 1) for sequence in together])
        for sequence, row in zip(together, rows, strict=True):
            torch.testing.assert_close(row.double(), sequences.alone(sequence, 1), atol=case.error, rtol=case.error)


@pytest.mark.parametrize("in_a_row", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keys_and_values_that_lie_in_a_row_are_not_copied(case: Case, in_a_row: bool, monkeypatch: pytest.MonkeyPatch):
    sequences, copies = Sequences(case, 1, 0), []
    if in_a_row:
        sequences.free.sort(reverse=True)
    sequences.forward([(0, 20)])
    select = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *given: copies.append(given) or select(*given))
    for _ in range(9):
        (row,) = sequences.forward([(0, 1)])
        torch.testing.assert_close(row.double(), sequences.alone(0, 1), atol=case.error, rtol=case.error)
    # What a window sees may lie in one block.
    assert (not copies) if in_a_row else (copies or case.window in (1, 3))


def test_a_sequence_fills_its_last_block_and_the_cache_to_the_last_place():
    sequences = Sequences(Case(), 1, 0)
    sequences.forward([(0, BLOCKS * BLOCK_SIZE - 1)])
    (row,) = sequences.forward([(0, 1)])
    assert not sequences.free
    torch.testing.assert_close(row, sequences.alone(0, 1), atol=1e-12, rtol=0)


def test_sequences_that_share_blocks_see_the_same_beginning():
    sequences = Sequences(Case(), 2, 0)
    for tensor in (sequences.key, sequences.value):
        tensor[1, :8] = tensor[0, :8]
    sequences.forward([(0, 10)])
    sequences.blocks[1], sequences.done[1] = sequences.blocks[0][:2], 8
    for tokens in (5, 1):
        rows = sequences.forward([(0, 1), (1, tokens)])
        torch.testing.assert_close(rows[0], sequences.alone(0, 1), atol=1e-12, rtol=0)
        torch.testing.assert_close(rows[1], sequences.alone(1, tokens), atol=1e-12, rtol=0)


def test_what_a_block_held_for_another_sequence_is_not_seen():
    sequences = Sequences(Case(), 2, 0)
    sequences.forward([(0, 30)])
    sequences.blocks[1] = sequences.blocks[0]
    for tokens in (3, 1, 9):
        (row,) = sequences.forward([(1, tokens)])
        torch.testing.assert_close(row, sequences.alone(1, tokens), atol=1e-12, rtol=0)


def test_each_layer_has_keys_and_values_of_its_own_and_its_window_is_known():
    cache = PagedCache(3, BLOCK_SIZE)
    assert (cache.nbytes, cache.windows) == (0, {})
    key, value = torch.zeros(7, 2, 8), torch.zeros(7, 2, 6, dtype=torch.float16)
    layers = [cache.layer(index, key, value, window) for index, window in ((0, None), (5, 16))]
    assert cache.windows == {0: None, 5: 16}
    shapes = [(tuple(t.shape), t.dtype) for layer in layers for t in layer]
    assert shapes == [((3, BLOCK_SIZE, 2, 8), torch.float32), ((3, BLOCK_SIZE, 2, 6), torch.float16)] * 2
    assert len({t.data_ptr() for layer in layers for t in layer}) == 4
    assert cache.layer(5, key, value, 16)[0] is layers[1][0]
    assert cache.nbytes == 2 * 3 * BLOCK_SIZE * 2 * (8 * 4 + 6 * 2)


def test_these_tests_tell_a_wrong_window_and_a_wrong_cap():
    for wrong in (replace(CASES["everything at once"], window=8), replace(CASES["everything at once"], softcap=2.1)):
        sequences = Sequences(CASES["everything at once"], 1, 0)
        (row,) = sequences.forward([(0, 20)])
        sequences.case = wrong
        assert not torch.allclose(row, sequences.alone(0, 20), atol=1e-3)
