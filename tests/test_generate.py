import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from LLM._base_model_handler import LoadOptions
from LLM.engine.pacing import FIRST_GUESS
from LLM.engine.request import Sampled
from LLM.engine.sequence import Slice
from LLM.model_srv_wsserver_echo import ModelHandler
from tests.conftest import Client, eventually, keyed
from tests.scripted import Gate, SetClock, in_engine, scripted

CONTEXT = 65536  # the echo model's
TOKENIZER = ModelHandler().load(Path(), LoadOptions(), lambda stage, progress: None).tokenizer


def ids_of(batch: list[Slice]) -> list[str]:
    return [part.sequence.request.key[1] for part in batch]


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


async def test_a_prompt_is_answered_token_by_token_then_done(client: Client) -> None:
    done = await client.generate(id="g1", prompt="héllo 😀")
    assert done["joined"] == "héllo 😀"
    assert done["finish_reason"] == "stop"
    assert done["usage"] == {"prompt_tokens": 11, "completion_tokens": 12, "cached_tokens": 0}
    assert "text" not in done
    [started] = client.of("g1", "started")
    assert started == {"type": "started", "id": "g1", "model": "wsserver/echo", "prompt_tokens": 11, "cached_tokens": 0}


async def test_a_conversation_is_answered(client: Client) -> None:
    messages = [
        {"role": "system", "content": "Repeat."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
    ]
    assert (await client.generate(id="g", messages=messages))["joined"] == "two"


async def test_without_an_id_the_server_names_one_that_can_be_used(client: Client) -> None:
    await client.send(type="generate", prompt="a", max_tokens=1)
    await client.send(type="generate", prompt="b", max_tokens=1)
    dones = [await client.until("done"), await client.until("done")]
    started = {frame["id"] for frame in client.frames if frame["type"] == "started"}
    assert len(started) == 2
    assert {done["id"] for done in dones} == started
    assert {client.checker.texts[id] for id in started} == {"a", "b"}


async def test_an_assigned_id_passes_by_one_the_client_uses() -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="auto-1", prompt="mine")
        await model.in_step(1)
        await client.send(type="generate", prompt="yours")
        await client.settle()
        model.open()
        first, second = [await client.until("done"), await client.until("done")]
        texts = {done["id"]: client.checker.texts[done["id"]] for done in (first, second)}
        assert texts.pop("auto-1") == "mine"
        assert list(texts.values()) == ["yours"]


async def test_many_generations_of_one_connection_run_at_once_and_none_gets_anothers_text(client: Client) -> None:
    prompts = {f"g{i}": f"{i}: " + "abcdefghij" * i for i in range(40)}
    for id, prompt in prompts.items():
        await client.send(type="generate", id=id, prompt=prompt)
    for _ in prompts:
        await client.until("done")
    assert client.checker.texts == prompts


async def test_two_generations_take_their_steps_together() -> None:
    async with scripted() as (server, model), server.client() as client:
        for id in ("a", "b"):
            await client.send(type="generate", id=id, prompt="hello")
        await in_engine(server, 2)
        model.open()
        await client.until("done")
        await client.until("done")
        assert [len(batch) for batch in model.steps].count(2) >= 4


async def test_an_answer_that_is_not_streamed_comes_whole_in_done(client: Client) -> None:
    done = await client.generate(id="g", prompt="héllo 😀", stream=False)
    assert (done["text"], done["joined"]) == ("héllo 😀", "")
    assert not client.of("g", "token")


async def test_an_empty_answer_that_is_not_streamed_has_an_empty_text(client: Client) -> None:
    assert (await client.generate(id="g", prompt="abc", stop="a", stream=False))["text"] == ""


@pytest.mark.parametrize(
    ("options", "text", "reason", "tokens"),
    [
        ({}, "one two three", "stop", 14),
        ({"max_tokens": 3}, "one", "length", 3),
        ({"max_tokens": 13}, "one two three", "length", 13),
        ({"max_tokens": 14}, "one two three", "stop", 14),
        ({"stop": "two"}, "one ", "stop", 7),
        ({"stop": ["three", " two"]}, "one", "stop", 7),
        ({"stop": ["nowhere", "e t"]}, "on", "stop", 5),
        ({"stop": []}, "one two three", "stop", 14),
        ({"stop": "three!"}, "one two three", "stop", 14),
        ({"stop": "one two x", "max_tokens": 9}, "one two t", "length", 9),
        ({"ignore_eos": True, "max_tokens": 18}, "one two threeone ", "length", 18),
        ({"ignore_eos": True, "stop": "eeo"}, "one two thr", "stop", 15),
        ({"stop_token_ids": [83]}, "one ", "stop", 5),
        ({"stop_token_ids": [83], "ignore_eos": True}, "one ", "stop", 5),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_ends_where_its_options_say(
    client: Client, options: dict[str, Any], text: str, reason: str, tokens: int, stream: bool
) -> None:
    done = await client.generate(id="g", prompt="one two three", stream=stream, **options)
    assert (done["joined"] or done.get("text"), done["finish_reason"]) == (text, reason)
    assert done["usage"]["completion_tokens"] == tokens


async def test_a_stop_string_is_never_shown_in_part(client: Client) -> None:
    await client.generate(id="g", prompt="ab</s>cd", stop=["</s>"])
    assert all("<" not in frame["text"] for frame in client.of("g", "token"))
    assert client.checker.texts["g"] == "ab"


async def test_no_frame_holds_half_a_character() -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="g", prompt="é😀漢")
        for step in range(1, 11):
            await model.in_step(step)
            await client.settle()
            model.step_gate.let()
        await client.until("done")
        assert [frame["text"] for frame in client.of("g", "token")] == ["é", "😀", "漢"]
        assert [(frame["seq"], frame["n"]) for frame in client.of("g", "token")] == [(0, 2), (2, 4), (6, 3)]


async def test_what_a_client_asks_for_reaches_the_engine() -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "seed": 2**63 - 1,
    }
    async with scripted() as (server, model), server.client() as client:
        model.open()
        others = {"stop_token_ids": [1, 2], "min_tokens": 3, "max_tokens": 4, "stop": ["x", "y"]}
        await client.generate(id="g", prompt="abc", logit_bias={"5": -1.5, "6": 2}, **sampling, **others)
        request = model.steps[0][0].sequence.request
        assert {name: getattr(request.sampling, name) for name in sampling} == sampling
        assert request.sampling.logit_bias == {5: -1.5, 6: 2.0}
        assert (request.min_tokens, request.max_tokens, request.stop) == (3, 4, ("x", "y"))
        assert request.end_token_ids == {256, 1, 2}


async def test_left_out_options_are_the_models_and_each_request_draws_its_own_seed() -> None:
    async with scripted() as (server, model), server.client() as client:
        model.open()
        for id in ("a", "b"):
            await client.generate(id=id, prompt="abc", ignore_eos=True, stop_token_ids=[1], stop="c")
        requests = {batch[0].sequence.request.key[1]: batch[0].sequence.request for batch in model.steps}
        assert requests["a"].sampling.seed != requests["b"].sampling.seed
        assert requests["a"].max_tokens == CONTEXT - 3
        assert requests["a"].end_token_ids == {1}
        assert requests["a"].sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("options", "code", "about"),
    [
        ({"prompt": "x" * CONTEXT}, "context_length_exceeded", "65536"),
        ({"prompt": "x" * (CONTEXT + 1), "max_tokens": 1}, "context_length_exceeded", "65537"),
        ({"prompt": "x", "max_tokens": CONTEXT}, "context_length_exceeded", "$.max_tokens"),
        ({"prompt": "x", "max_tokens": 2**31 - 1}, "context_length_exceeded", "$.max_tokens"),
        ({"prompt": "x", "stop_token_ids": [257]}, "bad_message", "$.stop_token_ids"),
        ({"prompt": "x", "logit_bias": {"257": 1}}, "bad_message", "$.logit_bias"),
        ({"messages": [{"role": "user", "content": ""}]}, "bad_message", "no tokens"),
    ],
)
async def test_what_the_model_cannot_serve_is_refused_by_name_with_a_done(
    client: Client, options: dict[str, Any], code: str, about: str
) -> None:
    done = await client.generate(id="g", **options)
    assert (done["finish_reason"], done["error"]["code"]) == ("error", code)
    assert about in done["error"]["message"]
    assert not client.of("g", "started", "prefill", "token")
    assert (await client.generate(id="g", prompt="next"))["joined"] == "next"


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "x" * (CONTEXT - 1)},
        {"prompt": "x" * (CONTEXT - 1), "max_tokens": 1},
        {"prompt": "x", "max_tokens": CONTEXT - 1},
        {"prompt": "x", "stop_token_ids": [256], "logit_bias": {"256": 100}},
    ],
)
async def test_what_just_fits_is_served(client: Client, options: dict[str, Any]) -> None:
    done = await client.generate(id="g", **options)
    assert done["finish_reason"] in ("stop", "length")
    assert done["joined"][:1] == "x"


async def test_a_long_prompt_goes_forward_in_chunks_and_tells_its_progress() -> None:
    async with scripted() as (server, model), server.client() as client:
        model.open()
        await client.generate(id="g", prompt="x" * 1000, max_tokens=1)
        assert model.steps_of("g") == [(0, 256), (256, 512), (512, 768), (768, 1000)]
        first, *_ = client.of("g", "prefill")
        assert (first["done"], first["total"]) == (256, 1000)


async def test_a_long_prompt_does_not_hold_up_a_running_generation() -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="short", prompt="hello")
        model.step_gate.let(1)
        await model.in_step(2)
        await client.send(type="generate", id="long", prompt="x" * 5000, max_tokens=1)
        await in_engine(server, 2)
        model.open()
        await client.until("done", id="long")
        # Its second step is measured; from the third on both go forward in every step, until the short one's end.
        steps = [ids_of(batch) for batch in model.steps]
        assert steps[:7] == [["short"], ["short"], *[["short", "long"]] * 4, ["long"]]
        chunks = model.steps_of("long")
        assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
        assert chunks[0] == (0, FIRST_GUESS)
        assert chunks[-1][1] == 5000


async def test_who_waits_is_told_its_place_and_every_change_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("LLM.engine.worker.POSITIONS_INTERVAL", 0)
    async with (
        scripted(max_active=1, keys=keyed("a", "b", "c")) as (server, model),
        server.client_of("a") as a,
        server.client_of("b") as b,
        server.client_of("c") as c,
    ):
        await a.send(type="generate", id="a", prompt="aaaa")
        await model.in_step(1)
        for number, (waiting, id) in enumerate([(b, "b1"), (c, "c1"), (b, "b2"), (c, "c2")], 2):
            await waiting.send(type="generate", id=id, prompt=id)
            await in_engine(server, number)
        model.step_gate.let(1)
        assert [(await c.until("queued"))["position"] for _ in range(2)] == [2, 4]
        assert [(await b.until("queued"))["position"] for _ in range(2)] == [1, 3]
        # It is b's turn, with or without the one that was in front.
        await b.send(type="cancel", id="b1")
        await b.settle()
        model.step_gate.let(1)
        assert (await b.until("queued", id="b2"))["position"] == 1
        assert (await c.until("queued", id="c2"))["position"] == 3
        model.open()
        await asyncio.gather(b.until("done", id="b2"), c.until("done", id="c2"), a.until("done"))
        assert list(dict.fromkeys(id for batch in model.steps for id in ids_of(batch))) == ["a", "b2", "c1", "c2"]
        assert not a.of("a", "queued")
        for client, id in ((b, "b2"), (c, "c2")):
            positions = [frame["position"] for frame in client.of(id, "queued")]
            assert positions == sorted(set(positions), reverse=True)


async def test_a_place_in_line_that_has_not_changed_is_not_told_again() -> None:
    async with (
        scripted(loaded=False, max_active=1) as (server, model),
        server.client() as client,
        server.client(local_addr=("127.0.0.2", 0)) as other,
    ):
        model.load_gate.shut()
        model.encode_gates["slow"] = Gate(0)
        for asker, id, position in ((client, "slow", 1), (other, "quick", 2)):
            await asker.send(type="generate", id=id, prompt=id)
            assert (await asker.until("queued"))["position"] == position
        model.load_gate.open()
        await model.in_step_of("quick")
        model.encode_gates["slow"].open()
        await in_engine(server, 2)
        model.open()
        await client.done("slow")
        assert [frame["position"] for frame in client.of("slow", "queued")] == [1]


async def test_a_full_line_refuses_and_serves_those_in_it() -> None:
    limits = {"max_requests_per_key": 258, "max_queued_per_key": 258}
    async with scripted(max_active=1, **limits) as (server, model), server.client() as a, server.client() as b:
        for client in (a, b):
            for number in range(129):
                await client.send(type="generate", id=f"g{number}", prompt="x")
        await in_engine(server, 258)
        model.open()
        dones = [await client.until("done") for client in (a, b) for _ in range(129)]
        refused = [done["error"] for done in dones if "error" in done]
        assert [error["code"] for error in refused] == ["overloaded"]
        assert "256" in refused[0]["message"]


async def test_more_at_once_than_a_connection_may_have_are_refused() -> None:
    async with scripted(max_queued_per_key=256) as (server, model), server.client() as client:
        for number in range(257):
            await client.send(type="generate", id=f"g{number}", prompt="x")
        assert (await client.until("done"))["error"]["code"] == "overloaded"
        await client.send(type="init", id="load")
        assert (await client.until("error"))["code"] == "overloaded"
        model.open()
        for _ in range(256):
            assert (await client.until("done"))["finish_reason"] == "stop"


async def test_a_done_says_how_long_things_took(client: Client) -> None:
    timings = (await client.generate(id="g", prompt="hello"))["timings"]
    assert timings.keys() == {"queued_ms", "prefill_ms", "ttft_ms", "total_ms", "tokens_per_s"}
    assert timings["queued_ms"] <= timings["ttft_ms"] <= timings["total_ms"]


async def test_a_model_that_raises_ends_what_runs_and_serves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async with scripted(max_active=2) as (server, model), server.client() as a, server.client() as b:
        for number, (client, id) in enumerate([(a, "a1"), (b, "b1"), (a, "a2"), (b, "b2")], 1):
            await client.send(type="generate", id=id, prompt=f"{id} says hello")
            await in_engine(server, number)
        model.step_errors[4] = ZeroDivisionError("/home/secret of b")
        model.open()
        for client, id in [(a, "a1"), (b, "b1")]:
            done = await client.done(id)
            assert (done["finish_reason"], done["error"]["code"]) == ("error", "internal")
            assert "secret" not in done["error"]["message"]
            assert f"{id} says hello".startswith(client.checker.texts[id])
        for client, id in [(a, "a2"), (b, "b2")]:
            assert (await client.done(id))["finish_reason"] == "stop"
            assert client.checker.texts[id] == f"{id} says hello"
        assert (await a.generate(id="a1", prompt="again"))["joined"] == "again"
        [logged] = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert logged.exc_info
        assert logged.exc_info[1] is model.step_errors[4]
        assert not model.held()


class Died(BaseException):
    pass


async def test_an_engine_thread_that_dies_ends_every_stream_and_whoever_comes_then_gets_a_new_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scripted(max_active=1) as (server, model), server.client() as a, server.client() as b:
        clock = server.models._clock = SetClock()
        for number, (client, id) in enumerate([(a, "running"), (b, "queued")], 1):
            await client.send(type="generate", id=id, prompt="hello")
            await in_engine(server, number)
        model.step_errors[3] = Died("of natural causes")
        model.open()
        for client in (a, b):
            done = await client.until("done")
            assert done["error"]["code"] == "internal"
            assert "natural causes" not in done["error"]["message"]
        assert "of natural causes" in caplog.text
        assert (await b.settle())["models"][0]["state"] == "restarting"
        for client in (a, b):
            await client.send(type="generate", id="again", prompt="hello")
        await eventually(lambda: clock.ahead == [1])
        clock.go(1)
        for client in (a, b):
            assert (await client.done("again"))["finish_reason"] == "stop"
        assert model.loads == 2
        assert [(entry["state"], entry["restarts"]) for entry in (await b.settle())["models"]] == [("ready", 1)]


@pytest.mark.parametrize(
    ("broken", "logged"),
    [(Sampled(-1), "could not be made text"), (Sampled(None), "are no numbers")],
    ids=["a token that is no text", "logits that are no numbers"],
)
async def test_what_cannot_be_said_ends_only_the_request_it_was_for(
    caplog: pytest.LogCaptureFixture, broken: Sampled, logged: str
) -> None:
    async with scripted() as (server, model), server.client() as client:
        await client.send(type="generate", id="healthy", prompt="hello")
        await model.in_step(1)
        await client.send(type="generate", id="broken", prompt="hello")
        await in_engine(server, 2)
        model.step_gate.let(4)
        await model.in_step(5)
        assert ids_of(model.steps[4]) == ["healthy", "broken"]
        model.step_results[5] = [Sampled(*tokens_of("o")), broken]
        model.open()
        assert (await client.done("broken"))["error"]["code"] == "internal"
        assert (await client.done("healthy"))["finish_reason"] == "stop"
        assert client.checker.texts["healthy"] == "hello"
        assert logged in caplog.text
        assert not model.held()


async def test_a_queued_generation_is_not_mistaken_for_a_running_one() -> None:
    async with scripted(max_active=1) as (server, model), server.client() as client:
        await client.send(type="generate", id="a", prompt="hello")
        await model.in_step(1)
        await client.send(type="generate", id="b", prompt="hello")
        await in_engine(server, 2)
        [entry] = (await client.settle())["models"]
        assert (entry["active"], entry["queued"], entry["capacity"]) == (1, 1, 1)
        model.open()
