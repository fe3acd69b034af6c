"""What goes to the recorded decode steps, and what beside them. Eager steps play the decoder here; tests/gpu has graphs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from LLM.engine.attention import PagedCache
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest
from LLM.engine.runner import BLOCK_SIZE, PagedRunner, ends_of
from LLM.engine.sampler import likeliest
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice
from tests.test_ahead import (
    GREEDY,
    KINDS,
    changeable,
    expected_of,
    first,
    fly,
    requests,
    sequence,
    serve,
    summary,
    three,
    whole,
)
from tests.test_runner import LONG

pytest.importorskip("triton", reason="the decode kernel needs Triton, which there is for Linux alone")

from LLM.engine import graph_runner
from LLM.engine.graph_decode import DecodeNumbers, HostNumbers
from LLM.engine.graph_runner import GraphRunner
from tests.test_graph_decode import as_lists

CAPACITY = 4
ROWS = 8
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimension, float32


@pytest.fixture(autouse=True)
def _one_thread():
    # These models are so small that two threads do nothing but wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return changeable()


class Played:
    """Takes what a decoder takes, and runs it eagerly; where the tokens in flight are has to be among what it is given."""

    def __init__(self, model: Any, cache: PagedCache, trash_block: int, capacity: int, blocks: int) -> None:
        self.note = "one size is missing"
        self.checked = False
        self.made_with = (trash_block, capacity, blocks)
        self.batches: list[list[Slice]] = []
        self.tokens = torch.zeros(ROWS, dtype=torch.long)
        self._runner = PagedRunner(model, cache)
        self._logits = torch.empty(ROWS, 96)

    def check(self, eager: Any) -> None:
        self.checked = True

    def takes(self, batch: list[Slice]) -> bool:
        return 0 < sum(part.stop - part.start for part in batch) <= ROWS and len(batch) <= CAPACITY

    def forward(self, batch: list[Slice], in_flight: dict[Sequence, int]) -> Tensor:
        self.batches.append(batch)
        known = [part.sequence.token_ids[:] for part in batch]
        for part in batch:
            if part.samples and part.sequence.token_ids[-1] == IN_FLIGHT:
                part.sequence.token_ids[-1] = max(0, int(self.tokens[in_flight[part.sequence]]))
        assert all(part.sequence.token_ids[part.start] != IN_FLIGHT for part in batch)
        # As a recording does: always in the same place, and lost with the next step.
        self._logits.fill_(torch.nan)
        self._logits[: len(batch)] = self._runner.forward(batch, ends_of(batch))
        self.tokens[: len(batch)] = likeliest(self._logits[: len(batch)])
        for part, token_ids in zip(batch, known, strict=True):
            part.sequence.token_ids[:] = token_ids
        return self._logits[: len(batch)]


def graphs(model: Any, monkeypatch: pytest.MonkeyPatch, blocks: int = 12) -> tuple[GraphRunner, Played]:
    monkeypatch.setattr(graph_runner, "GraphDecoder", Played)
    runner = GraphRunner(model, blocks, CAPACITY, context_length=100)
    decoder: Any = runner._decoder
    return runner, decoder


def test_the_last_block_is_nobodys_and_what_a_decoder_cannot_do_is_told(model: Any, monkeypatch: pytest.MonkeyPatch):
    runner, decoder = graphs(model, monkeypatch)
    assert (runner.block_count, runner.block_size) == (12, BLOCK_SIZE)
    assert runner.kv_bytes == 13 * BLOCK_SIZE * TOKEN_BYTES
    assert decoder.made_with == (12, CAPACITY, 7)
    assert decoder.checked
    assert decoder.batches == []
    assert runner.notes == ["one size is missing"]


def test_no_sequence_has_more_blocks_than_there_are(model: Any, monkeypatch: pytest.MonkeyPatch):
    assert graphs(model, monkeypatch, blocks=3)[1].made_with == (3, CAPACITY, 3)


@pytest.mark.parametrize("blocks", [60, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_one_eager_step_after_the_other(
    model: Any, kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch
):
    asked = requests(kind)
    expected = serve(PagedRunner(model, PagedCache(blocks, BLOCK_SIZE)), asked, monkeypatch)
    runner, decoder = graphs(model, monkeypatch, blocks)
    told = serve(runner, asked, monkeypatch)
    assert {key: summary(parts) for key, parts in told.items()} == {key: summary(parts) for key, parts in expected.items()}
    assert len(decoder.batches) > 20
    assert {len(batch) for batch in decoder.batches} >= {1, 2, 3}


def test_prompts_go_beside_the_slices_that_decode_and_each_row_stays_its_own(model: Any, monkeypatch: pytest.MonkeyPatch):
    (a1, a2), (b1, b2), (c1, _) = expected_of(model, 2)
    runner, decoder = graphs(model, monkeypatch)
    a, b, c = three()
    read_first = runner.launch([whole(a), whole(b)])
    assert decoder.batches == []
    fly(a, b)
    chunk = sequence("d", [7, 8], LONG[:25])
    read_second = runner.launch([whole(b, 7), whole(a, 20), whole(c), Slice(chunk, 0, 9)])
    assert [[part.sequence for part in batch] for batch in decoder.batches] == [[b, a]]
    assert first(read_first()) == [a1, b1]
    assert first(read_second()) == [b2, a2, c1, None]


def test_a_token_of_a_prompt_alone_in_a_step_samples_nothing(model: Any, monkeypatch: pytest.MonkeyPatch):
    (a1, a2), *_ = expected_of(model, 2)
    runner, decoder = graphs(model, monkeypatch)
    a, chunk = three()[0], sequence("d", [7, 8], LONG[:25])
    read_first = runner.launch([whole(a)])
    fly(a)
    read_second = runner.launch([Slice(chunk, 0, 1), whole(a, 20), Slice(chunk, 1, 6)])
    assert (first(read_first()), first(read_second())) == ([a1], [None, a2, None])
    assert first(runner.launch([Slice(chunk, 6, 7)])()) == [None]
    assert [len(batch) for batch in decoder.batches] == [3, 1]


def test_a_short_prompt_goes_with_those_that_decode_and_a_long_one_by_itself(model: Any, monkeypatch: pytest.MonkeyPatch):
    (a1, a2), (b1, b2), _ = expected_of(model, 2)
    runner, decoder = graphs(model, monkeypatch)
    a, b, _ = three()
    assert b.prompt_tokens < ROWS < a.prompt_tokens
    read_first = runner.launch([whole(a)])
    fly(a)
    read_second = runner.launch([whole(a, 20), whole(b)])
    fly(a, b)
    assert [[part.sequence for part in batch] for batch in decoder.batches] == [[a, b]]
    assert (first(read_first()), first(read_second())) == ([a1], [a2, b1])
    for one, known in ((a, a2), (b, b1)):
        one.token_ids[-1] = known
    assert first(runner.launch([whole(b, 7)])()) == [b2]


def test_more_than_were_recorded_go_forward_together_without_them(model: Any, monkeypatch: pytest.MonkeyPatch):
    (a1, a2), *_ = expected_of(model, 2)
    runner, decoder = graphs(model, monkeypatch)
    a, *_ = three()
    many = [sequence(str(n), [4 + n], [n]) for n in range(CAPACITY)]
    read_first = runner.launch([whole(a)])
    fly(a)
    read_second = runner.launch([whole(a, 20), *map(whole, many)])
    assert (first(read_first()), first(read_second())[0]) == ([a1], a2)
    assert decoder.batches == []


def numbers() -> DecodeNumbers:
    return DecodeNumbers(PagedCache(10, BLOCK_SIZE), CAPACITY, blocks=3, trash_block=9, device=torch.device("cpu"))


def decode_steps() -> Iterator[tuple[list[Slice], Tensor]]:
    """Give a run's decode steps and the tokens in flight in each; tables grow, and rows come, go and move."""
    scheduler = Scheduler(CAPACITY, BlockPool(9, BLOCK_SIZE), Pacing(64), reuse=False)
    for n in range(9):
        scheduler.add(GenerationRequest(n, tuple(range(3 + 7 * n % 20)), 5 + 3 * n, GREEDY))
    while batch := scheduler.next_batch():
        scheduler.retire(batch)
        scheduler.pacing.measured(1, 0, 1.0)
        if decoding := [part for part in batch if part.decodes]:
            yield decoding, torch.tensor([50 + part.sequence.completion_tokens for part in decoding])
        for part in batch:
            ids = part.sequence.token_ids
            ids[:] = [7 if token_id == IN_FLIGHT else token_id for token_id in ids]
            if part.samples:
                ids.append(IN_FLIGHT)
            if part.sequence.completion_tokens == part.sequence.request.max_tokens:
                scheduler.remove(part.sequence.request.key)


def test_the_numbers_of_a_step_stay_as_they_were_copied_while_the_next_ones_are_written(monkeypatch: pytest.MonkeyPatch):
    write, copied = HostNumbers.write, []

    def watched(host: HostNumbers, batch: list[Slice], rows: int, in_flight: dict[Sequence, int]) -> int:
        used = write(host, batch, rows, in_flight)
        # What was written last may still be on its way to the device.
        assert all(torch.equal(last.tensor, kept) for last, kept in copied[-1:])
        copied.append((host, host.tensor.clone()))
        return used

    monkeypatch.setattr(HostNumbers, "write", watched)
    written = numbers()
    for decoding, _ in decode_steps():
        written.write(decoding, CAPACITY, dict.fromkeys((part.sequence for part in decoding), 0))
    assert len(copied) > 20
    assert len({id(host) for host, _ in copied}) == 2


def test_numbers_written_in_turn_read_like_those_written_afresh_but_for_the_tokens_in_flight():
    written = numbers()
    for decoding, tokens in decode_steps():
        n = len(decoding)
        in_flight = {part.sequence: n - 1 - row for row, part in enumerate(decoding)}
        written.tokens[:n] = tokens.flip(0)
        written.write(decoding, CAPACITY, in_flight)
        afresh = numbers()
        afresh.write(decoding, CAPACITY, in_flight)
        spare = [0] * (CAPACITY - n)
        assert as_lists(afresh.read(CAPACITY))["ids"] == [0] * CAPACITY
        assert as_lists(written.read(CAPACITY)) == {**as_lists(afresh.read(CAPACITY)), "ids": [*tokens.tolist(), *spare]}
