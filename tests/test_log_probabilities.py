"""Log probabilities over real sockets. That every frame has them for just its own tokens, the checker sees to."""

from typing import Any

import pytest

from LLM.engine.request import Alternative, Sampled
from tests.conftest import Client
from tests.scripted import WIDE, scripted, slow_client
from tests.test_generate import tokens_of


def told(client: Client, id: str) -> list[int]:
    return [entry["token_id"] for entry in client.checker.scored[id]]


@pytest.mark.parametrize("count", [0, 1, 20])
async def test_every_token_that_is_shown_has_its_log_probability(client: Client, count: int) -> None:
    done = await client.generate(id="g", prompt="hé", logprobs=count)
    assert done["joined"] == "hé"
    h, *halves = tokens_of("hé")
    sure: list[dict[str, Any]] = [{"token_id": h, "text": "h", "logprob": 0.0}]
    sure += [{"token_id": half, "logprob": 0.0} for half in halves]
    assert client.checker.scored["g"] == ([{**entry, "top": [entry]} for entry in sure] if count else sure)
    # The end token has none: it shows nothing.
    assert done["usage"]["completion_tokens"] == len(sure) + 1


async def test_an_answer_that_comes_whole_has_all_its_log_probabilities_in_the_end(client: Client) -> None:
    streamed = await client.generate(id="s", prompt="hé", logprobs=2)
    whole = await client.generate(id="w", prompt="hé", logprobs=2, stream=False)
    assert (whole["text"], whole["logprobs"]) == (streamed["joined"], client.checker.scored["s"])
    assert "logprobs" not in await client.generate(id="n", prompt="hé", stream=False)


async def test_without_being_asked_for_there_are_no_log_probabilities(client: Client) -> None:
    await client.generate(id="g", prompt="hello", logprobs=None)
    assert not any("logprobs" in frame for frame in client.frames)


async def test_log_probabilities_go_out_as_the_model_has_them() -> None:
    async with scripted() as (server, model), server.client() as client:
        drawn, best, half = tokens_of("he")[0], tokens_of("he")[1], tokens_of("é")[0]
        alternatives = [(drawn, -0.75), (best, -0.5), (drawn, -0.75), (half, -9999.0)]
        model.step_results[1] = [Sampled(drawn, tuple(Alternative(*pair) for pair in alternatives))]
        model.open()
        await client.generate(id="g", prompt="x", logprobs=3, max_tokens=1)
        h, e = ({"token_id": id, "text": text, "logprob": p} for id, text, p in ((drawn, "h", -0.75), (best, "e", -0.5)))
        assert client.checker.scored["g"] == [{**h, "top": [e, h, {"token_id": half, "logprob": -9999.0}]}]


async def test_log_probabilities_wait_with_the_text_that_is_held_back() -> None:
    prompt = "ab</s😀"
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt=prompt, stop="</s>", logprobs=0)
        for step in range(1, 11):
            await model.in_step(step)
            await client.settle()
            model.step_gate.let()
        await client.until("done")
        assert [(frame["text"], frame["n"]) for frame in client.of("g", "token")] == [("a", 1), ("b", 1), ("</s😀", 7)]
        assert told(client, "g") == tokens_of(prompt)


@pytest.mark.parametrize(
    ("prompt", "stop", "shown", "texts"),
    [
        ("ab</s>cd", "</s>", "ab", ["a", "b"]),
        ("abc", "a", "", []),
        (WIDE + "b", "wb", WIDE[1:], [WIDE]),  # a token that is shown in part is told whole
    ],
    ids=["several tokens", "at once", "within a token"],
)
async def test_the_tokens_of_a_stop_string_that_show_nothing_have_no_log_probabilities(
    prompt: str, stop: str, shown: str, texts: list[str]
) -> None:
    async with scripted() as (server, model), server.client() as client:
        model.open()
        done = await client.generate(id="g", prompt=prompt, stop=stop, logprobs=1)
        assert (done["joined"], done["finish_reason"]) == (shown, "stop")
        assert [entry["text"] for entry in client.checker.scored["g"]] == texts


async def test_a_slow_reader_gets_every_log_probability_in_fewer_frames() -> None:
    async with scripted() as (server, model), slow_client(server) as client:
        client.socket.transport.pause_reading()
        await client.send(type="generate", id="g", prompt=WIDE * 10, logprobs=1, ignore_eos=True, max_tokens=65)
        model.open()
        await model.freed_of("g")
        client.socket.transport.resume_reading()
        await client.until("done")
        frames = client.of("g", "token")
        assert len(frames) < 60
        assert client.checker.texts["g"] == WIDE * 60
        # The end token, which is ignored here, shows nothing by itself: it comes with the next one.
        assert [entry["text"] for entry in client.checker.scored["g"]] == ([WIDE] * 10 + ["<|end|>"]) * 5 + [WIDE] * 10


async def test_log_probabilities_of_many_at_once_stay_with_their_own_request(client: Client) -> None:
    prompts = {f"g{i}": f"{i} " + "abcdefghij"[i:] * (i + 1) for i in range(10)}
    for i, (id, prompt) in enumerate(prompts.items()):
        await client.send(type="generate", id=id, prompt=prompt, **({"logprobs": i} if i % 3 else {}))
    for _ in prompts:
        await client.until("done")
    for i, (id, prompt) in enumerate(prompts.items()):
        assert told(client, id) == (tokens_of(prompt) if i % 3 else [])
