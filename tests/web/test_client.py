"""client.js in Node, over the server with a model whose every step the test decides, from the first answer to the end."""

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve

from tests.conftest import eventually, stopping
from tests.scripted import ScriptedModel, in_engine, put, scripted
from tests.web.node import NEEDS_NODE, node

pytestmark = NEEDS_NODE


async def first_id(model: ScriptedModel) -> str:
    """Give the id of what takes part in the model's first step."""
    await model.in_step(1)
    _, id, *_ = model.steps[0][0].sequence.request.key  # type: ignore[misc]
    return str(id)


@contextlib.asynccontextmanager
async def doorkeeper(talk: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    """Serve what a test says instead of the server, and give the address."""
    select = {"select_subprotocol": lambda client, offered: offered[0] if offered else None}
    async with serve(talk, "127.0.0.1", 0, **select) as listener:
        yield f"ws://127.0.0.1:{next(iter(listener.sockets)).getsockname()[1]}/ws"


# Answers.


async def test_the_text_comes_in_pieces_and_the_end_can_be_looked_at(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const answer = chat.generate({ messages: [{ role: "user", content: "abc" }] });
        for await (const piece of answer) say(piece);
        say(answer.done);
        chat.close();
    """
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        for piece in "abc":
            model.step_gate.let(1)
            assert await running.says() == piece
        model.open()
        done = await running.says()
        assert done["finish_reason"] == "stop"
        assert done["usage"]["completion_tokens"] == 4
        assert done["timings"]["ttft_ms"] <= done["timings"]["total_ms"]


async def test_a_signal_stops_it_and_the_loop_ends_with_what_there_was(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const stop = new AbortController();
        const answer = chat.generate({ prompt: "abcdef" }, { signal: stop.signal });
        let text = "";
        for await (const piece of answer) {
          text += piece;
          if (text === "ab") stop.abort();
        }
        say([text, answer.done.finish_reason, answer.done.timings.cancel_ms >= 0]);
        const late = chat.generate({ prompt: "abc" }, { signal: stop.signal });
        say([await late.text(), late.done.finish_reason, (await chat.status()).connection.active]);
    """
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        model.step_gate.let(2)
        id = await first_id(model)
        await stopping(server)
        model.step_gate.let(1)
        assert await running.says() == ["ab", "cancelled", True]
        assert model.frees(id) == 1
        assert await running.says() == ["", "cancelled", []]
        assert len(model.steps) == 3


@pytest.mark.parametrize("leave", ["break", 'throw new Error("enough")'])
async def test_leaving_the_loop_stops_it(tmp_path: Path, leave: str) -> None:
    script = f"""
        const chat = await connect(url);
        const answer = chat.generate({{ prompt: "abcdef" }});
        const read = async () => {{ for await (const piece of answer) {leave}; }};
        say([(await thrown(read()))?.message ?? null, answer.done.finish_reason]);
    """
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        model.step_gate.let(1)
        await stopping(server)
        model.open()
        assert await running.says() == ["enough" if "throw" in leave else None, "cancelled"]


async def test_several_answers_run_at_once_on_one_connection(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const prompts = ["one", "two, a little longer", "3"];
        say(await Promise.all(prompts.map((prompt) => chat.generate({ prompt }).text())));
    """
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        await in_engine(server, 3)
        model.open()
        assert await running.says() == ["one", "two, a little longer", "3"]


async def test_an_answer_that_is_not_streamed_is_a_text_too(tmp_path: Path) -> None:
    script = 'say(await (await connect(url)).generate({ prompt: "abc", stream: false }).text());'
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        model.open()
        assert await running.says() == "abc"


async def test_what_the_server_refuses_is_thrown_by_name(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        say(await thrown(chat.generate({ prompt: "abc", temperature: 99 }).text()));
        say(await thrown(chat.init({ model: "no/such" })));
        const first = chat.generate({ prompt: "abc" }, { onFrame: ({ type }) => type === "started" && say(type) });
        await told();
        const others = [1, 2].map(() => chat.generate({ prompt: "abc" }));
        const ends = await Promise.all(others.map((other) => thrown(other.text())));
        say(ends.find(({ code }) => code));
        say([await first.text(), ends.find((text) => text === "abc"), others.map(({ done }) => done.finish_reason).sort()]);
    """
    settings = {"max_active": 1, "max_queue": 1}
    async with scripted(**settings) as (server, model), node(tmp_path, server.url, script) as running:
        bad = await running.says()
        assert (bad["name"], bad["code"]) == ("ServerError", "bad_message")
        assert bad["message"].startswith("$.temperature")
        assert (await running.says())["code"] == "model_not_found"
        assert await running.says() == "started"
        running.tell()
        await in_engine(server, 3)
        model.open()
        full = await running.says()
        assert full["code"] == "overloaded"
        assert full["retryAfterMs"] > 0
        assert await running.says() == ["abc", "abc", ["error", "stop"]]


async def test_waits_and_progress_are_told(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const onFrame = ({ type, position, stage, done, n }) => say([type, position ?? stage ?? done ?? n ?? null]);
        const loading = chat.init({ model: "test/other" }, { onFrame });
        await told();
        await loading;
        const first = chat.generate({ prompt: "a" }, { onFrame: ({ type }) => type === "started" && say(type) });
        await told();
        const second = chat.generate({ prompt: "x".repeat(600), max_tokens: 1 }, { onFrame });
        await told();
        await Promise.all([first.text(), second.text()]);
    """
    async with scripted(max_active=1) as (server, _):
        model = put(server.models, "test/other")
        model.load_gate.shut()
        async with node(tmp_path, server.url, script) as running:
            assert await running.says() == ["loading", "config"]
            running.tell()
            model.load_gate.open()
            while (told := await running.says())[0] != "ready":
                assert told[0] == "loading"
            assert await running.says() == "started"
            running.tell()
            await in_engine(server, 2)
            model.step_gate.let(1)
            assert await running.says() == ["queued", 1]
            running.tell()
            model.open()
            frames = [await running.says()]
            while frames[-1][0] != "done":
                frames.append(await running.says())
            kinds = list(dict.fromkeys(kind for kind, _ in frames))
            assert kinds == ["started", "prefill", "token", "done"]


async def test_a_load_is_stopped_by_its_signal(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const stop = new AbortController();
        const onFrame = ({ type }) => type === "loading" && stop.abort();
        say(await thrown(chat.init({ model: "test/other" }, { signal: stop.signal, onFrame })));
        say((await chat.status()).available);
    """
    async with scripted() as (server, _):
        model = put(server.models, "test/other")
        model.load_gate.shut()
        async with node(tmp_path, server.url, script) as running:
            assert (await running.says())["code"] == "cancelled"
            assert "test/other" in await running.says()
            model.load_gate.open()


# Connections that end, or never begin.


async def test_who_hangs_up_stops_everything(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const answer = chat.generate({ prompt: "abc" }, { onFrame: () => chat.close() });
        say([(await thrown(answer.text())).code, (await thrown(chat.status())).code, chat.state]);
    """
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        assert await running.says() == ["closed", "closed", "closed"]
        model.step_gate.let(1)
        await eventually(lambda: len(model.freed) == 1)


async def test_where_nobody_listens_connect_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with node(tmp_path, f"ws://127.0.0.1:{port}/ws", "say((await thrown(connect(url))).code);") as running:
        assert await running.says() == "unreachable"


@pytest.mark.parametrize(
    ("code", "told"),
    [(1003, "closed"), (1009, "closed"), (4400, "closed"), (4401, "unauthenticated"), (4403, "forbidden")],
)
async def test_a_close_that_is_final_is_told_to_all_and_nobody_comes_back(tmp_path: Path, code: int, told: str) -> None:
    async def talk(client: ServerConnection) -> None:
        await client.recv()
        await client.close(code, "because")

    script = """
        const chat = await connect(url, { onState: (state) => say(state) });
        say(await thrown(chat.generate({ prompt: "a" }).text()));
        say((await thrown(chat.generate({ prompt: "a" }).text())).code);
    """
    async with doorkeeper(talk) as url, node(tmp_path, url, script) as running:
        assert [await running.says(), await running.says()] == ["open", "closed"]
        error = await running.says()
        assert (error["code"], error["message"]) == (told, "because")
        assert await running.says() == told
