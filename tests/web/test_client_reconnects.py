"""client.js when its connection is lost: what goes on, what is asked for anew, what is thrown, and how it comes back."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection

from tests.conftest import Running, eventually, stopping
from tests.scripted import scripted
from tests.torture.proxy import PROXIED, Link, Proxy
from tests.web.node import NEEDS_NODE, node
from tests.web.test_client import doorkeeper
from wsserver.job import Job

pytestmark = NEEDS_NODE

TEXT = "Once upon a time there was a cut."


def kept(server: Running) -> list[Job]:
    return list(server.server.resumables)


@contextlib.asynccontextmanager
async def line(server: Running) -> AsyncIterator[tuple[Proxy, str]]:
    """Give a way to the server that can break, and its address."""
    async with Proxy(server.server.port) as proxy:
        yield proxy, f"ws://127.0.0.1:{proxy.port}/ws"


async def last_link(proxy: Proxy, links: int = 1) -> Link:
    """Give the newest connection, once there have been so many."""
    await eventually(lambda: len(proxy.links) >= links)
    return list(proxy.links.values())[-1]


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
