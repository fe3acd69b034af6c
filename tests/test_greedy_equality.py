"""Greedy text is transformers' own, however it came about: in chunks, packed with others, over reused blocks, preempted."""

import asyncio
import random
from typing import Any

import pytest

from LLM.engine.runner import PagedRunner
from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import Sequence, Slice
from tests.conftest import DEFAULT_MODEL, Client, running
from tests.reference import NEW_TOKENS, Reference, assert_the_same

TOKEN_BYTES = 46_080  # of the default model's KV cache in float32: 30 layers, 3 heads of 64 numbers, keys and values
PEOPLE = ["Ada", "the old captain", "my neighbour", "Mr. Brown", "a girl from Oslo", "the tall robot", "Queen Anne"]
DEEDS = ["bought {} apples", "lost {} coins", "counted to {}", "wrote {} letters", "walked {} miles", "planted {} trees"]
PLACES = ["in the garden", "near the harbour", "on a rainy Monday", "without a word", "before breakfast", "for the king"]
ENDINGS = [" Therefore", "\n\nQuestion: who was it?\nAnswer:", " The moral is", "\n1.", ' "Why?" she asked.', ""]


def prompts(count: int, most_tokens: int, tokenizer: Any) -> dict[str, str]:
    """Make so many prompts of 1 to `most_tokens` tokens; every third one begins like the one before it."""
    draw = random.Random(7)
    made: dict[str, str] = {}
    ids: list[int] = []
    for number in range(count):
        length = 1 if number == 0 else most_tokens if number == 1 else round(most_tokens ** draw.uniform(0.3, 1))
        shared = tokenizer.decode(ids[: len(ids) * 3 // 4]) if number % 3 == 2 else ""
        text = shared + " ".join(sentence(draw) for _ in range(length // 6 + 1))
        ids = tokenizer(text)["input_ids"][:length]
        made[f"{number}"] = tokenizer.decode(ids) + draw.choice(ENDINGS[:1] if length > most_tokens - 20 else ENDINGS)
    return made


def sentence(draw: random.Random) -> str:
    deed = draw.choice(DEEDS).format(draw.randint(2, 99))
    return f"{draw.choice(PEOPLE).capitalize()} {deed} {draw.choice(PLACES)}."


class Seen:
    """What the engine did, seen from within: the proof that what is to be tested really happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.preempted = self.packed = self.chunked = 0
        preempt, forward = Scheduler._preempt, PagedRunner.forward

        def seen_preempt(scheduler: Scheduler, sequence: Sequence) -> None:
            self.preempted += 1
            preempt(scheduler, sequence)

        def seen_forward(runner: PagedRunner, batch: list[Slice], ends: list[int]) -> Any:
            self.packed += len(batch) > 1
            self.chunked += any(not part.samples for part in batch)
            return forward(runner, batch, ends)

        monkeypatch.setattr(Scheduler, "_preempt", seen_preempt)
        monkeypatch.setattr(PagedRunner, "forward", seen_forward)


async def texts_of(client: Client, asked: dict[str, str], at_once: int) -> dict[str, str]:
    """Ask for all, so many at once; give the texts."""
    waiting = list(asked.items())
    running_now = 0
    while waiting or running_now:
        while waiting and running_now < at_once:
            id, prompt = waiting.pop(0)
            await client.send(type="generate", id=id, prompt=prompt, temperature=0, max_tokens=NEW_TOKENS)
            running_now += 1
        done = await client.until("done")
        assert done["finish_reason"] in ("stop", "length"), done
        running_now -= 1
    return {id: client.checker.texts[id] for id in asked}


@pytest.mark.parametrize(
    ("count", "most_tokens", "at_once"),
    [
        pytest.param(8, 300, (4,), marks=pytest.mark.timeout(300)),
        pytest.param(100, 1500, (1, 4, 16), marks=[pytest.mark.torture, pytest.mark.timeout(3600)]),
    ],
)
async def test_greedy_is_transformers_own_in_chunks_with_reuse_and_preemption(
    default_model_folder: Any, monkeypatch: pytest.MonkeyPatch, count: int, most_tokens: int, at_once: tuple[int, ...]
):
    reference = Reference(default_model_folder)
    asked = prompts(count, most_tokens, reference.tokenizer)
    answers = {id: await asyncio.to_thread(reference.of_prompt, prompt) for id, prompt in asked.items()}
    # Room for the longest alone, and little more.
    kv_memory = (most_tokens + 2 * NEW_TOKENS + 64) * TOKEN_BYTES
    for number in at_once:
        seen = Seen(monkeypatch)
        settings = {"max_active": number, "kv_memory": kv_memory}
        async with (
            running(model=DEFAULT_MODEL, dtype="float32", device="cpu", **settings) as server,
            server.client() as client,
        ):
            texts = await texts_of(client, asked, number)
            assert_the_same(reference, texts, answers, most=3)
            assert seen.chunked
            assert any(done["usage"]["cached_tokens"] for done in client.checker.dones)
            assert (seen.packed > 0) == (seen.preempted > 0) == (number > 1)
        monkeypatch.undo()
