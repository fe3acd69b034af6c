"""Decode steps prepared for CUDA graphs, without CUDA: what is written for a step, what is recorded, and what is said of it.

A recording is replayed here by running the step again, and the kernel by Triton's interpreter. Real graphs are in tests/gpu.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from LLM.engine.attention import PagedCache
from LLM.engine.fuse import ON_GPU
from LLM.engine.kv_cache import BlockPool
from LLM.engine.pacing import Pacing
from LLM.engine.request import GenerationRequest
from LLM.engine.runner import BLOCK_SIZE, PagedRunner, page
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice
from tests.interpreter import interpreting

pytest.importorskip("triton", reason="the decode kernel needs Triton, which there is for Linux alone")

from LLM.engine import graph_decode
from LLM.engine.decode_layers import fuse_layers
from LLM.engine.graph_decode import LARGEST, MOST_SEEN, PROBE, DecodeNumbers, GraphDecoder, Recording

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **SIZES),
    "qwen3": partial(Qwen3Config, **SIZES),
    "gemma3": partial(Gemma3TextConfig, **WINDOWS, **SIZES),
}
LAYERS_WITH_KERNELS = {"llama": 2, "qwen3": 2, "gemma3": 0}
BLOCKS = 24
PROMPTS = {
    "one": [5],
    "long": [(7 * i * i + 3) % 96 for i in range(61)],
    "short": list(range(20, 27)),
    "late": list(range(30)),
}
CANCELLED_AFTER = 4
TOKENS = 6  # of an answer, each a second of the interpreter's


def play(run: Callable[[], Tensor], pool: Any) -> Recording:
    """Record a step where there are no graphs: to replay it is to run it again."""
    logits = run().clone()
    return Recording(lambda: logits.copy_(run()), logits, pool or object())


def make(name: str) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()


Texts = dict[str, list[int]]


def generate(runner: PagedRunner, decoder: GraphDecoder | None, tokens: int, cancelled: str | None) -> tuple[Texts, int]:
    """Answer all prompts greedily, three at a time in few blocks; give the tokens, and how many steps the decoder took."""
    scheduler = Scheduler(3, BlockPool(BLOCKS, BLOCK_SIZE), Pacing(64))
    sequences = {key: scheduler.add(GenerationRequest(key, tuple(ids), tokens)) for key, ids in PROMPTS.items()}
    steps = 0
    while batch := scheduler.next_batch():
        if decoder and decoder.takes(batch):
            logits, steps = decoder.forward(batch, {}), steps + 1
        else:
            logits = runner.forward(batch, [n - 1 for n in accumulate(part.stop - part.start for part in batch)])
        scheduler.retire(batch)
        for part, token_id in zip(batch, logits.argmax(-1).tolist(), strict=True):
            if part.samples:
                part.sequence.token_ids.append(token_id)
            key, made = part.sequence.request.key, part.sequence.completion_tokens
            if made == tokens or (key == cancelled and made == CANCELLED_AFTER):
                scheduler.remove(key)
    return {key: sequence.completion_ids for key, sequence in sequences.items() if sequence}, steps


def compare(name: str, tokens: int, cancelled: str | None) -> tuple[Texts, Texts, int]:
    """Give what eager steps and what recorded ones make of the prompts, and how many steps were recorded ones."""
    model = make(name)
    with torch.no_grad():
        assert all(list(fusion(model)) for fusion in ON_GPU.values())
    page(model)
    cache = PagedCache(BLOCKS + 1, BLOCK_SIZE)
    runner = PagedRunner(model, cache)
    assert fuse_layers(model, runner.warm_up) == LAYERS_WITH_KERNELS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_decode, "record", play)
        patch.setattr(graph_decode, "SIZES", [8, 4, 2, 1])
        decoder = GraphDecoder(model, cache, trash_block=BLOCKS, capacity=3, blocks=8)
    eager, _ = generate(runner, None, tokens, None)
    return eager, *generate(runner, decoder, tokens, cancelled)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    with interpreting() as call:
        yield partial(call, compare)


# The interpreter is slow, so there are few tokens and models; tests/gpu has more.
@pytest.mark.parametrize(("name", "cancelled"), [("llama", None), ("qwen3", None), ("gemma3", "short")])
def test_recorded_steps_give_the_tokens_of_eager_ones_also_when_one_is_cancelled(
    name: str, cancelled: str | None, interpreted: Callable[..., Any]
):
    eager, recorded, steps = interpreted(name, TOKENS, cancelled)
    if cancelled:
        eager[cancelled] = eager[cancelled][:CANCELLED_AFTER]
    assert recorded == eager
    assert steps > TOKENS


def slices(*described: tuple[int, list[int]]) -> list[Slice]:
    """Give one-token slices of sequences of so many tokens, the last one being ten times their number, in these blocks."""
    batch = []
    for tokens, blocks in described:
        sequence = Sequence(GenerationRequest("key", tuple(range(tokens - 1)), 1), blocks=blocks)
        sequence.token_ids.append(10 * tokens)
        batch.append(Slice(sequence, tokens - 1, tokens))
    return batch


def numbers(rows: int = 4) -> DecodeNumbers:
    return DecodeNumbers(PagedCache(10, BLOCK_SIZE), rows, blocks=3, trash_block=9, device=torch.device("cpu"))


def as_lists(read: tuple[Tensor, Tensor, Tensor, graph_decode.DecodeStep]) -> dict[str, Any]:
    ids, positions, _, step = read
    table = [row[: -(-n // BLOCK_SIZE)] for row, n in zip(step.block_table.tolist(), step.lengths.tolist(), strict=True)]
    return {"ids": ids.tolist()[0], "positions": positions.tolist()[0], "slots": step.slots.tolist(), "table": table}


def test_a_steps_numbers_say_where_each_row_writes_and_what_it_sees():
    written = numbers()
    written.write(slices((1, [4]), (17, [2, 7]), (48, [8, 0, 5])), 4, {})
    ids, positions, ends, step = written.read(4)
    assert ends.tolist() == [0, 1, 2, 0]
    assert ids.shape == positions.shape == (1, 4)
    assert (ids.dtype, positions.dtype, step.slots.dtype) == (torch.int64,) * 3
    assert step.block_table.dtype == step.lengths.dtype == torch.int32
    assert step.lengths.tolist() == [1, 17, 48, 1]
    assert as_lists(written.read(4)) == {
        "ids": [10, 170, 480, 0],
        "positions": [0, 16, 47, 0],
        "slots": [64, 112, 95, 144],
        "table": [[4], [2, 7], [8, 0, 5], [9]],
    }
    assert as_lists(written.read(2))["ids"] == [10, 170]


def test_rows_left_over_write_to_the_block_of_nobody_whoever_had_them_before():
    written = numbers()
    written.write(slices((20, [1, 2]), (33, [3, 4, 5]), (1, [6])), 4, {})
    written.write(slices((21, [1, 2])), 4, {})
    assert as_lists(written.read(4)) == {
        "ids": [210, 0, 0, 0],
        "positions": [20, 0, 0, 0],
        "slots": [36, 144, 144, 144],
        "table": [[1, 2], [9], [9], [9]],
    }


def test_a_table_follows_a_sequence_that_grows_leaves_moves_or_comes_back_with_other_blocks():
    written = numbers(2)
    growing, other = slices((16, [1]), (30, [2, 3]))
    written.write([growing, other], 2, {})
    growing.sequence.token_ids.append(5)
    growing.sequence.blocks += [4]
    grown = Slice(growing.sequence, 16, 17)
    written.write([grown, other], 2, {})
    assert as_lists(written.read(2))["table"] == [[1, 4], [2, 3]]
    written.write([other], 2, {})
    assert as_lists(written.read(2))["table"] == [[2, 3], [9]]
    written.write([other, grown], 2, {})
    assert as_lists(written.read(2))["table"] == [[2, 3], [1, 4]]
    grown.sequence.blocks = [7, 8]
    written.write([other, grown], 2, {})
    assert as_lists(written.read(2))["table"] == [[2, 3], [7, 8]]
    written.write([other], 2, {})
    written.write([other, grown], 2, {})
    assert as_lists(written.read(2))["table"] == [[2, 3], [7, 8]]


def test_the_numbers_stay_where_a_graph_looks_for_them():
    written = numbers()
    *_, before = written.read(4)
    written.write(slices((40, [1, 2, 3])), 4, {})
    assert written.read(4)[-1].block_table.data_ptr() == before.block_table.data_ptr()


def test_a_prompts_tokens_are_rows_that_see_more_and_more_of_the_same_blocks():
    written = numbers(8)
    sequence = Sequence(GenerationRequest("key", tuple(range(20)), 1), blocks=[6, 1])
    (other,) = slices((5, [3]))
    written.write([other, Slice(sequence, 14, 18)], 8, {})
    assert written.read(8)[2].tolist()[:2] == [0, 4]
    assert as_lists(written.read(8)) == {
        "ids": [50, 14, 15, 16, 17, 0, 0, 0],
        "positions": [4, 14, 15, 16, 17, 0, 0, 0],
        "slots": [52, 110, 111, 16, 17, 144, 144, 144],
        "table": [[3], [6], [6], [6, 1], [6, 1], [9], [9], [9]],
    }
    # Afterwards each row is another's.
    written.write(slices((1, [4]), (40, [7, 8, 2]), (2, [5])), 4, {})
    assert as_lists(written.read(4))["table"] == [[4], [7, 8, 2], [5], [9]]


def test_tokens_in_flight_are_read_from_where_the_last_step_left_them():
    written = numbers()
    first, second, third = slices((1, [4]), (2, [5]), (3, [6]))
    chunk = Sequence(GenerationRequest("key", (7, 8), 1), blocks=[1])
    for sequence in (first.sequence, third.sequence, chunk):
        sequence.token_ids[-1] = IN_FLIGHT
    written.tokens[:4] = torch.tensor([91, -1, 93, 94])
    in_flight = {first.sequence: 3, third.sequence: 0, chunk: 1}
    written.write([first, second, Slice(chunk, 0, 2)], 4, in_flight)
    # The last one's has failed: its next one is for nothing.
    assert as_lists(written.read(4))["ids"] == [94, 20, 7, 0]
    written.write([third], 4, in_flight)
    assert as_lists(written.read(4))["ids"] == [91, 0, 0, 0]


class Adding(torch.nn.Module):
    """A model that says the sum of a token and its position, as if its vocabulary were that large."""

    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=900))

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> SimpleNamespace:
        kept = (input_ids + position_ids)[:, logits_to_keep]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(kept, 1000).float())


def adding(capacity: int = 4) -> GraphDecoder:
    return GraphDecoder(Adding(), PagedCache(10, BLOCK_SIZE), trash_block=9, capacity=capacity, blocks=3)


@pytest.fixture(autouse=True)
def _few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_decode, "SIZES", [4, 2, 1])


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Every recording that was made: of how many slices, and with which pool."""
    made = []

    def watched(run: Callable[[], Tensor], pool: Any) -> Recording:
        recording = play(run, pool)
        made.append((len(recording.logits), pool))
        return recording

    monkeypatch.setattr(graph_decode, "record", watched)
    return made


def test_the_largest_is_recorded_first_and_all_share_its_memory(played: list[tuple[int, Any]]):
    assert adding().sizes == (1, 2, 4)
    assert [rows for rows, _ in played] == [4, 2, 1]
    assert played[0][1] is None
    assert played[1][1] is played[2][1] is not None


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_step_is_padded_to_the_next_size_and_gives_its_own_rows(rows: int):
    decoder = adding()
    batch = slices(*[(n, [n]) for n in range(1, rows + 1)])
    assert decoder.takes(batch)
    assert decoder.forward(batch, {}).argmax(-1).tolist() == [10 * n + n - 1 for n in range(1, rows + 1)]
    assert decoder.tokens[:rows].tolist() == [10 * n + n - 1 for n in range(1, rows + 1)]


@pytest.mark.usefixtures("played")
def test_a_step_gives_the_logits_after_each_slice_alone():
    decoder = adding(capacity=2)
    chunk = Sequence(GenerationRequest("key", (5, 6, 7), 1), blocks=[1])
    batch = [*slices((1, [0])), Slice(chunk, 0, 3)]
    assert decoder.takes(batch)
    assert decoder.forward(batch, {}).argmax(-1).tolist() == [10, 7 + 2]


@pytest.mark.usefixtures("played")
def test_steps_that_were_not_recorded_are_not_taken():
    decoder = adding(capacity=3)
    assert not decoder.takes([])
    assert not decoder.takes(slices(*[(1, [n]) for n in range(5)]))
    assert not decoder.takes(slices(*[(1, [n]) for n in range(4)]))
    (whole,) = slices((9, [1]))
    assert not decoder.takes([whole, whole._replace(start=4)])
    assert decoder.takes([whole, whole._replace(start=6)])
    far = MOST_SEEN // 2
    assert decoder.takes([whole._replace(start=far - 2, stop=far)])
    assert not decoder.takes([whole._replace(start=far, stop=far + 2)])
    assert decoder.takes([whole._replace(start=2 * far, stop=2 * far + 1)])


def failing(error: Exception, largest: int) -> Callable[..., Recording]:
    def record(run: Callable[[], Tensor], pool: Any) -> Recording:
        recording = play(run, pool)
        if len(recording.logits) > largest:
            raise error
        return recording

    return record


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("operation not permitted when stream is capturing"), "the model cannot be recorded"),
        (AssertionError("keys and values lie alike"), "the model cannot be recorded"),
    ],
)
def test_what_cannot_be_recorded_is_left_out_and_said(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(graph_decode, "record", failing(error, largest=2))
    with caplog.at_level(logging.WARNING):
        decoder = adding()
    assert decoder.sizes == (1, 2)
    assert decoder.note == f"no CUDA graphs for batches of 4 ({why})"
    assert str(error) in caplog.text
    assert decoder.takes(slices((1, [1]), (2, [2])))
    assert not decoder.takes(slices((1, [1]), (2, [2]), (3, [3])))


def test_without_any_recording_no_step_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph_decode, "record", failing(torch.OutOfMemoryError(), largest=0))
    decoder = adding(2)
    assert decoder.sizes == ()
    assert not decoder.takes(slices((1, [1])))
    decoder.check(lambda batch, ends: torch.zeros(1, 1000))


def added(batch: list[Slice], ends: list[int]) -> Tensor:
    (part,) = batch
    assert ends == [part.stop - 1] == [PROBE - 1]
    last, kept = torch.tensor([part.sequence.token_ids[-1:]]), torch.tensor([0])
    logits: Tensor = Adding()(last, torch.tensor([[part.stop - 1]]), kept).logits
    return logits[0]


@pytest.mark.usefixtures("played")
def test_more_sequences_than_the_largest_graph_has_rows_are_told():
    assert adding(LARGEST).note is None
    assert adding(LARGEST + 1).note == f"no CUDA graphs for batches of more than {LARGEST}"


@pytest.mark.usefixtures("played")
def test_recordings_that_do_what_the_eager_step_does_are_kept():
    decoder = adding()
    decoder.check(added)
    assert decoder.sizes == (1, 2, 4)
    assert decoder.note is None


@pytest.mark.parametrize(("factor", "error"), [(3, "2.0e+00"), (torch.nan, "nan")])
@pytest.mark.parametrize("row", [0, 3])
def test_a_recording_that_differs_in_any_row_is_dropped(
    row: int, factor: float, error: str, monkeypatch: pytest.MonkeyPatch
):
    def record(run: Callable[[], Tensor], pool: Any) -> Recording:
        recording = play(run, pool)

        def replay() -> None:
            recording.replay()
            if len(recording.logits) == 4:
                recording.logits[row] *= factor

        return Recording(replay, recording.logits, recording.pool)

    monkeypatch.setattr(graph_decode, "record", record)
    decoder = adding(4)
    decoder.check(added)
    assert decoder.sizes == (1, 2)
    assert decoder.note == f"no CUDA graphs for batches of 4 (differs from the eager step by {error})"
