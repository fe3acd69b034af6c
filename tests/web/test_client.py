"""client.js in Node, against the server with a model whose every step the test decides, and through a line that breaks."""

import asyncio
import contextlib
import gzip
import re
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import get_args

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from tests.conftest import Running, eventually
from tests.scripted import ScriptedModel, in_engine, put, scripted
from tests.test_auth import names
from tests.torture.proxy import PROXIED, Link, Proxy
from tests.web.node import NEEDS_NODE, WEB, node
from wsserver.auth import Keys, digest
from wsserver.job import Job
from wsserver.protocol import Done, ErrorCode, FinishReason, Generate, Init, Limits, Ready

pytestmark = NEEDS_NODE

TEXT = "Once upon a time there was a cut."
TSC = Path(__file__).parent / "node_modules" / ".bin" / "tsc"


def kept(server: Running) -> list[Job]:
    return list(server.server.resumables)


async def stopping(server: Running) -> None:
    """Wait until the server has read a cancel of something resumable."""
    await eventually(lambda: any(job.stopping for job in kept(server)))


async def first_id(model: ScriptedModel) -> str:
    """Give the id of what takes part in the model's first step."""
    await model.in_step(1)
    _, id, *_ = model.steps[0][0].sequence.request.key  # type: ignore[misc]
    return str(id)


@contextlib.asynccontextmanager
async def line(server: Running) -> AsyncIterator[tuple[Proxy, str]]:
    """Give a way to the server that can break, and its address."""
    async with Proxy(server.server.port) as proxy:
        yield proxy, f"ws://127.0.0.1:{proxy.port}/ws"


async def last_link(proxy: Proxy, links: int = 1) -> Link:
    """Give the newest connection, once there have been so many."""
    await eventually(lambda: len(proxy.links) >= links)
    return list(proxy.links.values())[-1]


@contextlib.asynccontextmanager
async def doorkeeper(
    talk: Callable[[ServerConnection], Awaitable[None]], admits: Callable[[Request], bool] = lambda _: True
) -> AsyncIterator[str]:
    """Serve what a test says instead of the server, and give the address; refuses handshakes with a 401."""

    def at_the_door(client: ServerConnection, request: Request) -> Response | None:
        return None if admits(request) else client.respond(HTTPStatus.UNAUTHORIZED, "no\n")

    select = {"select_subprotocol": lambda client, offered: offered[0] if offered else None}
    async with serve(talk, "127.0.0.1", 0, process_request=at_the_door, **select) as listener:
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


# Connections that are lost.


async def test_an_answer_outlives_a_cut_and_every_change_is_told(tmp_path: Path) -> None:
    script = """
        const states = [];
        const chat = await connect(url, { onState: (state) => states.push(state) });
        const answer = chat.generate({ prompt: "TEXT" });
        let text = "";
        for await (const piece of answer) if ((text += piece).length === 5) say(text);
        say([text, answer.done.finish_reason, states]);
    """.replace("TEXT", TEXT)
    async with (
        scripted(allow_host=PROXIED) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        model.step_gate.let(5)
        assert await running.says() == TEXT[:5]
        (await last_link(proxy)).cut()
        await eventually(lambda: kept(server)[0].listener is None)
        model.open()
        assert await running.says() == [TEXT, "stop", ["open", "connecting", "open"]]


async def test_what_had_not_begun_is_asked_anew_and_by_the_same_model(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        await chat.init({ model: "test/other" });
        const started = [];
        const onFrame = ({ type, model }) => type === "started" && started.push(model);
        const answers = ["one", "two"].map((prompt) => chat.generate({ prompt }, { onFrame }));
        say([await answers[0].text(), await answers[1].text(), started]);
    """
    async with scripted(max_active=1, allow_host=PROXIED) as (server, _), line(server) as (proxy, url):
        model = put(server.models, "test/other")
        async with node(tmp_path, url, script) as running:
            await in_engine(server, 2)
            (await last_link(proxy)).cut()
            await last_link(proxy, 2)
            model.open()
            assert await running.says() == ["one", "two", ["test/other"] * 2]


async def test_what_is_asked_when_the_connection_is_back_is_asked_once(tmp_path: Path) -> None:
    script = """
        let times = 0;
        const chat = await connect(url, { onState: (state) => state === "open" && ++times === 2 && ask() });
        const ask = async () => say(await chat.generate({ prompt: "abc" }).text());
        say("open");
        await told();
    """
    async with (
        scripted(allow_host=PROXIED) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        model.open()
        assert await running.says() == "open"
        (await last_link(proxy)).cut()
        assert await running.says() == "abc"
        running.tell()


async def test_a_model_that_a_new_connection_cannot_use_ends_it(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url, { onState: (state, { error }) => error && say([state, error.code]) });
        await chat.init({ model: "test/other" });
        say((await thrown(chat.generate({ prompt: "a".repeat(9) }).text())).code);
    """
    async with scripted(allow_host=PROXIED) as (server, _), line(server) as (proxy, url):
        model = put(server.models, "test/other")
        async with node(tmp_path, url, script) as running:
            await in_engine(server, 1)
            del server.models.listing["test/other"]
            (await last_link(proxy)).cut()
            assert await running.says() == ["closed", "model_not_found"]
            assert await running.says() == "model_not_found"
            model.open()


async def forgotten(server: Running, proxy: Proxy) -> None:
    """Cut the line, and wait until nothing can be resumed any more; the client comes back later than that."""
    (await last_link(proxy)).cut()
    await eventually(lambda: not kept(server))


async def test_an_answer_that_the_server_has_forgotten_is_thrown_and_what_came_of_it_kept(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const answer = chat.generate({ prompt: "abcdef" });
        let text = "";
        const read = async () => { for await (const piece of answer) if ((text += piece) === "ab") say(text); };
        say([(await thrown(read())).code, text, answer.done]);
        say(await chat.generate({ prompt: "again" }).text());
    """
    async with (
        scripted(resume_window=0.05, allow_host=PROXIED) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        model.step_gate.let(2)
        assert await running.says() == "ab"
        await forgotten(server, proxy)
        assert await running.says() == ["resume_expired", "ab", None]
        model.open()
        assert await running.says() == "again"


async def test_an_answer_that_the_server_has_forgotten_is_asked_anew_if_nothing_of_it_came(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const onFrame = ({ type }) => say(type);
        say(await chat.generate({ prompt: "abc" }, { onFrame }).text());
    """
    async with (
        scripted(resume_window=0.05, allow_host=PROXIED) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        assert await running.says() == "started"
        await forgotten(server, proxy)
        assert await running.says() == "error"
        model.open()
        said = [await running.says()]
        while said[-1] != "done":
            said.append(await running.says())
        assert (said[0], await running.says()) == ("started", "abc")


async def test_an_answer_that_was_not_to_be_resumed_ends_with_its_connection(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const answer = chat.generate({ prompt: "abc", resumable: false }, { onFrame: ({ type }) => say(type) });
        say((await thrown(answer.text())).code);
    """
    async with (
        scripted(allow_host=PROXIED) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        assert await running.says() == "started"
        (await last_link(proxy)).cut()
        assert await running.says() == "connection_lost"
        model.open()


@pytest.mark.parametrize("when", ["before the cut", "after the cut"])
async def test_a_stop_without_a_connection_ends_the_answer_now_and_the_server_is_told_later(
    tmp_path: Path, when: str
) -> None:
    script = """
        const stop = new AbortController();
        const onState = (state) => state === "connecting" && stop.abort();
        const chat = await connect(url, { onState });
        const answer = chat.generate({ prompt: "abcdef" }, { signal: stop.signal });
        let text = "";
        for await (const piece of answer) {
          say((text += piece));
          if ((await told()) === "stop") stop.abort();
        }
        say([text, answer.done.finish_reason, chat.state]);
        await told();
    """
    async with (
        scripted(allow_host=PROXIED) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        model.step_gate.let(1)
        assert await running.says() == "a"
        link = await last_link(proxy)
        if when == "before the cut":
            link.freeze()  # the cancel is lost on its way
            running.tell("stop")
        else:
            running.tell()
        link.cut()
        assert await running.says() == ["a", "cancelled", "connecting"]
        await stopping(server)
        model.step_gate.let(1)
        await eventually(lambda: len(model.freed) == 1)
        running.tell()


async def test_a_line_that_is_dead_without_a_word_is_noticed_while_something_is_waited_for(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url, { patience: 300 });
        const answer = chat.generate({ prompt: "TEXT" });
        let text = "";
        for await (const piece of answer) if ((text += piece).length === 5) say(text);
        say(text);
    """.replace("TEXT", TEXT)
    async with (
        scripted(allow_host=PROXIED) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        model.step_gate.let(5)
        assert await running.says() == TEXT[:5]
        (await last_link(proxy)).freeze()
        model.open()
        assert await running.says() == TEXT
        assert len(proxy.links) == 2


async def test_a_slow_model_behind_a_line_that_lives_is_waited_for(tmp_path: Path) -> None:
    script = """
        const states = [];
        const chat = await connect(url, { patience: 150, onState: (state) => states.push(state) });
        const answer = chat.generate({ prompt: "abc" });
        setTimeout(() => say("waited"), 600);
        say([await answer.text(), states]);
    """
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        assert await running.says() == "waited"
        model.open()
        assert await running.says() == ["abc", ["open"]]


async def test_an_answer_goes_on_in_another_client_and_the_first_one_is_told(tmp_path: Path) -> None:
    script = """
        const [first, second] = [await connect(url), await connect(url)];
        const begun = first.generate({ prompt: "TEXT" });
        const there = [];
        const read = async () => { for await (const piece of begun) there.push(piece) === 1 && say("begun"); };
        const reading = thrown(read());
        await told();
        const { id, resumeToken } = begun;
        const whole = second.resume({ id, resumeToken });
        say((await reading).code);
        say(await whole.text());
        say((await thrown(second.resume({ id, resumeToken: "x" }).text())).code);
    """.replace("TEXT", TEXT)
    async with scripted() as (server, model), node(tmp_path, server.url, script) as running:
        model.step_gate.let(1)
        assert await running.says() == "begun"
        running.tell()
        assert await running.says() == "detached"
        model.open()
        assert await running.says() == TEXT
        assert await running.says() == "resume_expired"


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


async def test_it_comes_back_after_delays_that_grow_and_are_not_the_same_for_all(tmp_path: Path) -> None:
    async def talk(client: ServerConnection) -> None:
        await client.close(1013, "too many")

    script = """
        const onState = (state, { retryInMs, reason }) => state === "connecting" && say([retryInMs, reason]);
        const chat = await connect(url, { onState });
        await told();
    """
    async with doorkeeper(talk) as url, node(tmp_path, url, script) as running:
        delays = []
        for longest in (500, 1000, 2000):
            delay, reason = await running.says()
            assert longest / 2 <= delay <= longest
            assert reason == "too many"
            delays.append(delay)
        assert not any(delay.is_integer() for delay in map(float, delays))
        running.tell()


# Keys.


async def test_the_key_goes_with_the_first_init_and_with_no_second_one(tmp_path: Path) -> None:
    script = """
        const first = await connect(url, { token: "sk-right" });
        await first.init({ model: "test/other" });
        say(await first.generate({ prompt: "abc" }).text());
        const second = await connect(url, { token: "sk-right" });
        say((await second.status()).available.includes("test/other"));
        const third = await connect(url, { token: "sk-right" });
        say(third.state);
        await told();
    """
    async with scripted(keys=Keys({"alice": digest("sk-right")})) as (server, default):
        other = put(server.models, "test/other")
        other.open()
        async with node(tmp_path, server.url, script) as running:
            assert await running.says() == "abc"
            assert await running.says() is True
            assert await running.says() == "open"
            # The third one has asked for nothing, and is known all the same.
            await eventually(lambda: names(server) == ["alice"] * 3)
            running.tell()
        assert (other.loads, default.loads) == (1, 1)


async def test_the_key_is_shown_again_after_a_cut_and_the_answer_goes_on(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url, { token: "sk-right, ž" });
        const answer = chat.generate({ prompt: "TEXT" });
        let text = "";
        for await (const piece of answer) if ((text += piece).length === 5) say(text);
        say(text);
    """.replace("TEXT", TEXT)
    keys = Keys({"alice": digest("sk-right, ž")})
    async with (
        scripted(allow_host=PROXIED, keys=keys) as (server, model),
        line(server) as (proxy, url),
        node(tmp_path, url, script) as running,
    ):
        model.step_gate.let(5)
        assert await running.says() == TEXT[:5]
        (await last_link(proxy)).cut()
        model.open()
        assert await running.says() == TEXT


@pytest.mark.parametrize("first", ["chat.status()", "chat.init()", 'chat.generate({ prompt: "a" }).text()'])
async def test_a_wrong_key_is_told_by_name_and_costs_one_try(tmp_path: Path, first: str) -> None:
    script = f"""
        for (const token of ["wrong", "wrong too", "right"]) {{
          const chat = await connect(url, {{ token }});
          const told = await thrown({first});
          say(told.code ?? "welcome");
        }}
    """
    settings = {"keys": Keys({"alice": digest("right")}), "max_auth_failures": 3}
    async with scripted(**settings) as (server, model), node(tmp_path, server.url, script) as running:
        model.open()
        assert [await running.says() for _ in range(3)] == ["unauthenticated", "unauthenticated", "welcome"]


async def test_who_needs_a_key_and_has_none_is_told_by_name(tmp_path: Path) -> None:
    script = 'say((await thrown((await connect(url)).generate({ prompt: "a" }).text())).code);'
    async with (
        scripted(keys=Keys({"alice": digest("right")})) as (server, _),
        node(tmp_path, server.url, script) as running,
    ):
        assert await running.says() == "unauthenticated"


# The files.


def test_it_is_small() -> None:
    assert len(gzip.compress((WEB / "client.js").read_bytes(), mtime=0)) < 5 * 1024


def test_its_types_know_every_word_of_the_protocol() -> None:
    types = (WEB / "client.d.ts").read_text()
    codes = re.search(r"export type ErrorCode =(.*?)\n\n", types, re.DOTALL)
    reasons = re.search(r"finish_reason: (.*?);", types)
    assert codes
    assert reasons
    own = {"unreachable", "connection_lost", "detached", "closed"}
    assert set(re.findall(r'"(\w+)"', codes[1])) == {*get_args(ErrorCode), *own}
    assert set(re.findall(r'"(\w+)"', reasons[1])) == set(get_args(FinishReason))
    named = {name.rstrip("?") for name in re.findall(r"\b(\w+\??):", types)}
    for message in (Generate, Init, Ready, Limits, Done):
        assert named >= set(message.__struct_fields__) - {"token"}


async def test_its_types_are_what_a_caller_writes_and_nothing_else(tmp_path: Path) -> None:
    if not TSC.exists():
        pytest.skip("needs TypeScript: npm ci --prefix tests/web")
    shutil.copyfile(WEB / "client.d.ts", tmp_path / "client.d.ts")
    (tmp_path / "client.js").touch()
    shutil.copyfile(TSC.parents[2] / "types.ts", tmp_path / "types.ts")
    command = f"{TSC} --strict --noEmit --target esnext --module esnext --moduleResolution bundler types.ts"
    process = await asyncio.create_subprocess_exec(*command.split(), cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert (printed.decode(), process.returncode) == ("", 0)
