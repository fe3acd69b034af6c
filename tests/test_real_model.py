"""The default model, from a client's socket to its weights and back: its greedy words are transformers' own."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Hashable
from typing import Any

import pytest
import pytest_asyncio

from LLM.engine.request import Sampled
from LLM.engine.runner import BLOCK_SIZE, PagedRunner
from LLM.engine.sequence import Slice
from LLM.errors import Refused
from tests.conftest import DEFAULT_MODEL, ECHO, Client, Running, running
from tests.reference import NEW_TOKENS, Reference, assert_the_same

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNK = 256
FABLE = "A fox saw grapes hanging high on a vine, {} of them, and jumped for them again and again. "

PROMPTS = {
    "one token": "The",
    "a few words": "The capital of France is",
    "digits": "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    "a sentence": "It was a bright cold day in April, and the clocks were striking thirteen; nobody in the street",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "json": '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "inventions": [',
    "unicode": "Žluťoučký kůň 🐎 пьёт воду, 日本語もできます。En français : «",
    "under one chunk": "".join(FABLE.format(i) for i in range(9)),
    "over one chunk": "".join(FABLE.format(i) for i in range(14)),
    "over two chunks": "".join(FABLE.format(i) for i in range(26)),
}
CHAT = [{"role": "user", "content": "Name a fruit that is red."}]
LONG_PROMPT = "word " * 3000


@pytest.fixture(scope="module")
def reference(default_model_folder: Any) -> Reference:
    return Reference(default_model_folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Running]:
    async with running(model=DEFAULT_MODEL, dtype="float32", device="cpu") as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Running) -> AsyncIterator[Client]:
    async with server.client() as client:
        yield client


def greedy(**fields: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": NEW_TOKENS, **fields}


# Greedy.


@pytest.mark.timeout(300)
async def test_greedy_is_transformers_own_for_one_prompt_after_the_other(client: Client, reference: Reference):
    texts, some = {}, dict(list(PROMPTS.items())[::2])
    for name, prompt in some.items():
        done = await client.generate(id=name, **greedy(prompt=prompt))
        ids, _ = reference.of_prompt(prompt)
        assert done["usage"]["prompt_tokens"] == len(reference.tokenizer(prompt)["input_ids"])
        assert done["finish_reason"] == ("stop" if len(ids) < NEW_TOKENS else "length")
        texts[name] = done["joined"]
    assert_the_same(reference, texts, {name: reference.of_prompt(prompt) for name, prompt in some.items()})


@pytest.mark.timeout(300)
async def test_greedy_is_transformers_own_for_eight_at_once(server: Running, reference: Reference):
    async def ask(name: str, prompt: str) -> tuple[str, str]:
        async with server.client() as client:
            return name, (await client.generate(id=name, **greedy(prompt=prompt)))["joined"]

    eight = dict(list(PROMPTS.items())[-8:])
    texts = dict(await asyncio.gather(*(ask(name, prompt) for name, prompt in eight.items())))
    assert_the_same(reference, texts, {name: reference.of_prompt(prompt) for name, prompt in eight.items()})


async def test_the_prompts_are_of_very_different_lengths(reference: Reference):
    lengths = sorted(len(reference.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS.values())
    assert len(lengths) >= 10
    assert lengths[0] == 1
    assert lengths[-3] < CHUNK < lengths[-2] < 2 * CHUNK < lengths[-1]


TURNS = [{"role": "assistant", "content": "A strawberry."}, {"role": "user", "content": "And a green one?"}]
SYSTEM = {"role": "system", "content": "You know everything about fruit."}


@pytest.mark.parametrize("messages", [CHAT, [SYSTEM, *CHAT, *TURNS]], ids=["a question", "turns"])
async def test_a_chat_is_the_template_and_generate(client: Client, reference: Reference, messages: list[dict[str, str]]):
    ids, margins = reference.of_chat(messages)
    done = await client.generate(id="chat", **greedy(messages=messages))
    shown = [token_id for token_id in ids if token_id != reference.tokenizer.eos_token_id]
    assert_the_same(reference, {"chat": done["joined"]}, {"chat": (shown, margins)})
    assert done["usage"]["completion_tokens"] == len(ids)


# Sampling and stopping.


async def test_a_seed_gives_the_same_text_twice_and_another_seed_another(client: Client):
    async def say(id: str, seed: int) -> str:
        return (await client.generate(id=id, prompt="My name is", temperature=1.0, seed=seed, max_tokens=12))["joined"]

    first = await say("first", 1)
    assert await say("again", 1) == first
    assert len({first, await say("second", 2), await say("third", 3)}) == 3


async def test_a_seed_gives_the_same_text_whoever_else_is_served(client: Client):
    fields = {"prompt": "My name is", "temperature": 1.0, "seed": 5, "max_tokens": 10}
    alone = (await client.generate(id="alone", **fields))["joined"]
    for n in range(3):
        await client.send(type="generate", id=f"n{n}", prompt="Once " * n + "upon", temperature=1.0, max_tokens=10)
    await client.send(type="generate", id="amid", **fields)
    while len(client.checker.dones) < 5:
        await client.until("done")
    assert client.checker.texts["amid"] == alone


async def test_a_stop_string_cuts_the_answer_before_it(client: Client, reference: Reference):
    prompt = PROMPTS["a few words"]
    whole = reference.text(reference.of_prompt(prompt)[0])
    stop = whole[12:17]
    done = await client.generate(id="s", **greedy(prompt=prompt, stop=["never comes", stop]))
    assert done["finish_reason"] == "stop"
    assert done["joined"] == whole[: whole.index(stop)]
    unread = await client.generate(id="t", **greedy(prompt=prompt, stop=stop, stream=False))
    assert unread["text"] == done["joined"]


async def test_what_does_not_fit_the_context_is_refused_by_the_models_own_numbers(client: Client):
    done = await client.generate(id="long", prompt="word " * 9000, max_tokens=5)
    assert done["error"]["code"] == "context_length_exceeded"
    assert "8192" in done["error"]["message"]


# Cancels, counted in steps.


class Steps:
    """Counts the runner's steps; a shut gate holds each of them until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[Slice]] = []
        self.freed: list[Hashable] = []
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._gate = threading.Semaphore(0)
        step, free = PagedRunner.step, PagedRunner.free

        def counted_step(runner: PagedRunner, batch: list[Slice]) -> list[Sampled | None]:
            self.batches.append(batch)
            self.begun.put(len(self.batches))
            assert self._gate.acquire(timeout=60), "the test never let this step go"
            return step(runner, batch)

        def counted_free(runner: PagedRunner, key: Hashable) -> None:
            self.freed.append(key)
            free(runner, key)

        monkeypatch.setattr(PagedRunner, "step", counted_step)
        monkeypatch.setattr(PagedRunner, "free", counted_free)

    async def stand_before(self, number: int) -> None:
        """Let steps go until the one with this number stands before the gate."""
        while await asyncio.to_thread(self.begun.get, timeout=60) < number:
            self._gate.release()

    def open(self) -> None:
        self._gate.release(1000)


@pytest.mark.parametrize(
    ("prompt", "running", "further"),
    [(PROMPTS["a few words"], 6, 1), (LONG_PROMPT, 2, 0), (LONG_PROMPT, 1, 0)],
    ids=["two decode steps", "one chunk, the second", "one chunk, the first"],
)
async def test_a_cancel_is_answered_within(
    client: Client, monkeypatch: pytest.MonkeyPatch, prompt: str, running: int, further: int
):
    steps = Steps(monkeypatch)
    await client.send(type="generate", id="g", **greedy(prompt=prompt, max_tokens=1000, ignore_eos=True))
    await steps.stand_before(running)
    await client.send(type="cancel", id="g")
    await client.send(type="status")
    await client.until("status")  # so the cancel has been read too, while that step stands
    steps.open()
    done = await client.until("done", id="g")
    assert done["finish_reason"] == "cancelled"
    assert len(steps.batches) <= running + further
    assert (done["usage"]["completion_tokens"] == 0) == (prompt is LONG_PROMPT)
    assert len(steps.freed) == 1


async def test_a_long_prompt_goes_through_in_chunks_and_again_only_in_its_last_block(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    steps = Steps(monkeypatch)
    steps.open()
    prompt = "In another tale, " + PROMPTS["over two chunks"]
    dones = [await client.generate(id=id, **greedy(prompt=prompt, max_tokens=1)) for id in ("first", "second")]
    tokens = dones[0]["usage"]["prompt_tokens"]
    last_block = (tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    slices = [(part.start, part.stop) for (part,) in steps.batches]
    assert slices == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, tokens), (last_block, tokens)]
    assert [done["usage"]["cached_tokens"] for done in dones] == [0, last_block]


async def test_a_cancel_leaves_its_neighbours_words_as_they_are(client: Client, reference: Reference):
    await client.send(type="generate", id="out", prompt=LONG_PROMPT, max_tokens=5)
    await client.send(type="generate", id="in", **greedy(prompt=PROMPTS["code"]))
    await client.until("started", id="out")
    await client.send(type="cancel", id="out")
    await client.until("done", id="in")
    assert [(done["id"], done["finish_reason"]) for done in client.checker.dones] == [("out", "cancelled"), ("in", "length")]
    assert_the_same(reference, {"in": client.checker.texts["in"]}, {"in": reference.of_prompt(PROMPTS["code"])})


# Models.


async def test_init_switches_between_two_models_on_one_server(client: Client):
    await client.send(type="init", id="i1", model=ECHO)
    assert (await client.until("ready"))["model"]["id"] == ECHO
    assert (await client.generate(id="e", prompt="hello"))["joined"] == "hello"
    await client.send(type="init", id="i2", model=DEFAULT_MODEL)
    described = (await client.until("ready"))["model"]
    assert described == {
        "id": DEFAULT_MODEL,
        "context_length": 8192,
        "dtype": "float32",
        "quantization": "none",
        "device": "cpu",
    }
    assert "Paris" in (await client.generate(id="f", **greedy(prompt="The capital of France is")))["joined"]


async def test_one_model_answers_while_another_is_in_a_step(server: Running, monkeypatch: pytest.MonkeyPatch):
    steps = Steps(monkeypatch)
    async with server.client() as one, server.client() as other:
        await one.send(type="generate", id="real", **greedy(prompt=PROMPTS["digits"], max_tokens=3))
        await steps.stand_before(2)
        await other.send(type="init", model=ECHO)
        await other.until("ready")
        assert (await other.generate(id="echo", prompt="in between"))["joined"] == "in between"
        assert len(steps.batches) == 2
        steps.open()
        assert (await one.until("done"))["finish_reason"] == "length"


async def test_status_tells_what_the_model_takes(client: Client, reference: Reference):
    await client.generate(id="g", **greedy(prompt="Hi", max_tokens=1))
    await client.send(type="status")
    models = {model["id"]: model for model in (await client.until("status"))["models"]}
    real = models[DEFAULT_MODEL]
    parameters = sum(p.numel() for p in reference.model.parameters())
    table = reference.model.get_input_embeddings().weight.numel()
    # Where a CPU reads weights in an order of its own, the output layer has its own copy of the tied table.
    held = (real["memory_bytes"] - real["kv_cache"]["bytes"]) / 4
    assert min(abs(held - parameters), abs(held - parameters - table)) < 0.001 * parameters
    assert real["kv_cache"] == {"tokens": 23296, "bytes": 23296 * 46080}
    assert (real["state"], real["active"], real["queued"], real["capacity"]) == ("ready", 0, 0, 8)


async def test_the_drop_ins_own_sampling_is_the_default(client: Client, monkeypatch: pytest.MonkeyPatch):
    steps = Steps(monkeypatch)
    steps.open()
    await client.generate(id="g", prompt="Hi", max_tokens=1)
    sampling = steps.batches[0][0].sequence.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 0.9, 0)


async def test_a_hub_name_that_is_not_on_disk_is_not_looked_for(client: Client, server: Running):
    await client.send(type="init", id="i", model="HuggingFaceTB/SmolLM2-360M-Instruct")
    error = await client.until("error")
    assert error["code"] == "model_not_found"
    with pytest.raises(Refused):
        server.models.resolve("HuggingFaceTB/SmolLM2-360M-Instruct")
