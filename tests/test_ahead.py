"""Steps launched one ahead, by a real worker over a tiny model on the CPU: nobody's text may tell that they were."""

import queue
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from LLM.engine import answer as answer_module
from LLM.engine import runner as runner_module
from LLM.engine import worker as worker_module
from LLM.engine.ahead import AheadRunner
from LLM.engine.attention import PagedCache
from LLM.engine.request import Delta, Finished, GenerationRequest, Part, Sampled, Sampling
from LLM.engine.runner import BLOCK_SIZE, PagedRunner, page
from LLM.engine.sampler import sample
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice
from LLM.engine.step import RunsAhead
from LLM.engine.stream import GenerationStream
from LLM.engine.worker import Close, EngineSettings, Inbox, Open, Parts, Worker
from tests.test_runner import LONG, config, make
from tests.test_thread import TOKENIZER

GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=1.5, top_p=0.95, top_k=40, seed=11)
PENALISED = Sampling(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.5, seed=3)
BIASED = Sampling(temperature=1.0, min_p=0.02, logit_bias={7: 2.0, 9: -100.0}, seed=5)
KINDS = {"greedy": [GREEDY], "seeded": [SEEDED], "mixed": [GREEDY, SEEDED, PENALISED, BIASED, GREEDY, SEEDED, GREEDY]}


@pytest.fixture(autouse=True)
def _one_thread():
    # These models are so small that two threads do nothing but wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changeable() -> Any:
    """Make a paged model whose next token hangs on the last one: untied, it does not say the same one for ever."""
    made = make(config(LlamaConfig, tie_word_embeddings=False))
    page(made)
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return changeable()


def requests(kind: str, how_many: int = 14) -> list[GenerationRequest]:
    """Give prompts of 1 to 60 tokens, every third one beginning like the one before it, with ends of several sorts."""
    made: list[GenerationRequest] = []
    ids: list[int] = []
    for n in range(how_many):
        length = 1 + 17 * n % 60
        ids = [*ids[: len(ids) * 3 // 4], n] if n % 3 == 2 else [(i * i + 5 * n) % 96 for i in range(length)]
        ends = frozenset(range(0, 96, 2)) if n % 4 == 1 else frozenset()
        details: dict[str, Any] = {"end_token_ids": ends, "min_tokens": 3, "logprobs": (None, 0, 4)[n % 3]}
        if n % 5 == 3:
            details["stop"] = ("A", "B", "C")
        sampling = KINDS[kind][n % len(KINDS[kind])]
        made.append(GenerationRequest(n, tuple(ids), (1, 2, 12, 25)[n % 4], sampling, **details))
    return made


class Watched(AheadRunner):
    """Counts what a test wants to have seen."""

    def __init__(self, model: Any, cache: PagedCache) -> None:
        super().__init__(model, cache)
        self.flown = self.landed_first = self.chunked = 0

    def launch(self, batch: list[Slice]) -> Any:
        flown = [part.sequence.token_ids[-1] == IN_FLIGHT for part in batch]
        self.flown += any(flown)
        self.landed_first += any(part.decodes for part in batch) and not any(flown)
        self.chunked += any(not part.samples for part in batch)
        return super().launch(batch)


def serve(runner: PagedRunner, asked: list[GenerationRequest], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Part]]:
    """Let a worker serve all to their ends, on a clock that ticks when looked at; give the parts that each was told."""
    clock = SimpleNamespace(monotonic=count(1000).__next__)
    monkeypatch.setattr(worker_module, "time", clock)
    monkeypatch.setattr(answer_module, "time", clock)
    inbox: Inbox = queue.SimpleQueue()
    told: dict[Any, list[Part]] = {request.key: [] for request in asked}

    def post(parts: Parts) -> None:
        for stream, part in parts:
            told[stream.request.key].append(part)
        if all(parts and isinstance(parts[-1], Finished) for parts in told.values()):
            inbox.put(Close())

    for request in asked:
        inbox.put(Open(GenerationStream(request, lambda stream: None, lambda stream: None)))
    runner.max_prefill = 24
    Worker(runner, TOKENIZER, EngineSettings(4), inbox, post).run()
    return told


@pytest.fixture
def preempted_in_flight(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whoever was preempted while a token of theirs was in flight."""
    seen, preempt = [], Scheduler._preempt

    def watched(scheduler: Scheduler, sequence: Sequence) -> None:
        if sequence.token_ids[-1] == IN_FLIGHT:
            seen.append(sequence.request.key)
        preempt(scheduler, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", watched)
    return seen


def summary(parts: list[Part]) -> tuple[str, str, int]:
    last = parts[-1]
    assert isinstance(last, Finished)
    return "".join(part.text for part in parts if isinstance(part, Delta)), last.reason, last.completion_tokens


def scores(parts: list[Part]) -> list[tuple[int, float]]:
    """Give every (token id, log probability) told, alternatives too."""
    entries = [entry for part in parts if isinstance(part, Delta) for entry in part.logprobs]
    return [(scored.token_id, scored.logprob) for entry in entries for scored in entry]


@pytest.mark.parametrize("blocks", [60, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_log_probabilities_are_those_of_one_step_after_the_other(
    model: Any, kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch, preempted_in_flight: list[Any]
):
    asked = requests(kind)
    expected = serve(PagedRunner(model, PagedCache(blocks, BLOCK_SIZE)), asked, monkeypatch)
    runner = Watched(model, PagedCache(blocks, BLOCK_SIZE))
    told = serve(runner, asked, monkeypatch)
    assert {key: summary(parts) for key, parts in told.items()} == {key: summary(parts) for key, parts in expected.items()}
    for key, parts in told.items():
        found, wanted = scores(parts), scores(expected[key])
        assert [token_id for token_id, _ in found] == [token_id for token_id, _ in wanted]
        assert [logprob for _, logprob in found] == pytest.approx([logprob for _, logprob in wanted], abs=1e-3)
    # It is no proof unless all this happened.
    assert {summary(parts)[1] for parts in told.values()} == {"stop", "length"}
    assert runner.flown > 10
    assert runner.chunked
    assert bool(preempted_in_flight) == (blocks == 7)
    assert any(parts[-1].cached_tokens for parts in told.values() if isinstance(parts[-1], Finished))
    assert sum(len(scores(parts)) for parts in told.values()) > 50
    assert (runner.landed_first > 3) == (kind == "mixed")


def sequence(key: str, blocks: list[int], ids: list[int]) -> Sequence:
    return Sequence(GenerationRequest(key, tuple(ids), 20, GREEDY), blocks=blocks)


def whole(one: Sequence, start: int = 0) -> Slice:
    return Slice(one, start, len(one.token_ids))


def fly(*sequences: Sequence) -> None:
    for one in sequences:
        one.token_ids.append(IN_FLIGHT)


def first(results: list[Sampled | None]) -> list[int | None]:
    return [result and result.token_id for result in results]


def three() -> list[Sequence]:
    return [
        sequence(*described)
        for described in (("a", [3, 0], LONG[:20]), ("b", [5], list(range(5, 12))), ("c", [1, 2], LONG[::-1][:30]))
    ]


@pytest.fixture
def runner(model: Any) -> AheadRunner:
    return AheadRunner(model, PagedCache(12, BLOCK_SIZE))


def expected_of(model: Any, steps: int) -> list[list[int]]:
    """Give the next tokens of each of the three, step by step, every one known before the next."""
    plain, sequences = PagedRunner(model, PagedCache(12, BLOCK_SIZE)), three()
    for number in range(steps):
        results = plain.step([whole(one, len(one.token_ids) - 1 if number else 0) for one in sequences])
        for one, token_id in zip(sequences, first(results), strict=True):
            assert token_id is not None
            one.token_ids.append(token_id)
    return [one.completion_ids for one in sequences]


def test_only_a_runner_that_launches_runs_ahead(model: Any, runner: AheadRunner):
    assert isinstance(runner, RunsAhead)
    assert not isinstance(PagedRunner(model, PagedCache(12, BLOCK_SIZE)), RunsAhead)


def test_tokens_in_flight_find_their_sequences_in_any_order_and_beside_chunks(model: Any, runner: AheadRunner):
    (a1, a2), (b1, b2), (c1, c2) = expected_of(model, 2)
    assert len({a1, b1, c1}) == 3, "or a mistake would not show"
    a, b, c = three()
    chunk, late = sequence("d", [7, 8], LONG[:25]), sequence("e", [9], LONG[30:35])
    read_first = runner.launch([whole(a), Slice(chunk, 0, 10), whole(b), whole(c)])
    fly(a, b, c)
    read_second = runner.launch([whole(c, 30), whole(a, 20), Slice(chunk, 10, 20), whole(late), whole(b, 7)])
    assert first(read_first()) == [a1, None, b1, c1]
    c, a, none, other, b = first(read_second())
    assert (a, b, c, none) == (a2, b2, c2, None)
    assert other is not None


def test_a_token_in_flight_may_be_the_end_of_a_text_that_is_computed_again(model: Any, runner: AheadRunner):
    (a1, a2), *_ = expected_of(model, 2)
    a, b, c = three()
    read = runner.launch([whole(b), whole(a)])
    fly(a)
    a.blocks = [10, 4]
    again = runner.launch([whole(c), whole(a)])
    assert first(read())[1] == a1
    assert first(again())[1] == a2


def test_results_are_those_of_the_launch_whatever_became_of_the_sequences(model: Any, runner: AheadRunner):
    expected = [tokens[0] for tokens in expected_of(model, 1)]
    a, b, c = three()
    read = runner.launch([whole(a), whole(b), whole(c)])
    fly(a, b)
    c.token_ids.clear()
    assert first(read()) == expected


def test_a_row_without_a_token_in_flight_spoils_no_neighbour(
    model: Any, runner: AheadRunner, monkeypatch: pytest.MonkeyPatch
):
    _, (b1, b2), _ = expected_of(model, 2)
    a, b, _ = three()

    def spoiling(logits: Tensor, sequences: list[Sequence]) -> Any:
        return sample(logits.masked_fill(torch.tensor([[one is a] for one in sequences]), torch.nan), sequences)

    monkeypatch.setattr(runner_module, "sample", spoiling)
    read_first = runner.launch([whole(a), whole(b)])
    fly(a, b)
    read_second = runner.launch([whole(a, 20), whole(b, 7)])
    assert read_first() == [Sampled(None), Sampled(b1)]
    assert read_second() == [Sampled(None), Sampled(b2)]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_launch_without_memory_leaves_what_is_in_flight_to_be_found_by_the_next(
    model: Any, runner: AheadRunner, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    (a1, a2), (b1, b2), _ = expected_of(model, 2)
    a, b, c = three()
    read_first = runner.launch([whole(a), whole(b)])
    fly(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "sample", raising(error))
        with pytest.raises(MemoryError):
            runner.launch([whole(b, 7), whole(a, 20), whole(c)])
    read_second = runner.launch([whole(b, 7), whole(a, 20)])
    assert (first(read_first()), first(read_second())) == ([a1, b1], [b2, a2])


def test_another_exception_of_a_launch_is_not_taken_for_want_of_memory(runner: AheadRunner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "sample", raising(RuntimeError("a kernel failed")))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        runner.launch([whole(three()[0])])


def raising(error: Exception) -> Any:
    def raise_it(*_: Any) -> Any:
        raise error

    return raise_it
