"""client.js when its connection is lost and models were chosen: each answer is asked for anew of its own model."""

from pathlib import Path

import pytest

from tests.conftest import ECHO
from tests.scripted import in_engine, put, scripted
from tests.torture.proxy import PROXIED
from tests.web.node import NEEDS_NODE, node
from tests.web.test_client_reconnects import last_link, line

pytestmark = NEEDS_NODE


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


@pytest.mark.parametrize("loads", ["ready", "loading"])
async def test_what_waits_for_an_earlier_model_is_asked_of_that_one_again(tmp_path: Path, loads: str) -> None:
    script = """
        const chat = await connect(url);
        const started = new Map();
        const ask = (prompt) => {
          const onFrame = ({ type, model }) => type === "started" && started.set(prompt, model);
          return chat.generate({ prompt }, { onFrame }).text();
        };
        const texts = ["one", "two"].map(ask);
        await chat.init({ model: "test/more" });
        texts.push(...["three", "four"].map(ask));
        const load = chat.init({ model: "test/most" });
        if ("LOADS" === "ready") await load;
        texts.push(...["five", "six"].map(ask));
        say(await Promise.all(texts));
        await load;
        say(await ask("seven"));
        say([...started.entries()].sort().map(([prompt, model]) => `${prompt} ${model}`));
    """.replace("LOADS", loads)
    async with scripted(max_active=1, allow_host=PROXIED) as (server, model), line(server) as (proxy, url):
        models = [model, put(server.models, "test/more"), put(server.models, "test/most")]
        if loads == "loading":
            models[2].load_gate.shut()
        async with node(tmp_path, url, script) as running:
            await in_engine(server, 6)
            (await last_link(proxy)).cut()
            await last_link(proxy, 2)
            for each in models:
                each.open()
            assert await running.says() == ["one", "two", "three", "four", "five", "six"]
            assert await running.says() == "seven"
            first, second, third = ECHO, "test/more", "test/most"
            assert await running.says() == [
                f"five {third}",
                f"four {second}",
                f"one {first}",
                f"seven {third}",
                f"six {third}",
                f"three {second}",
                f"two {first}",
            ]


async def test_what_waits_for_a_load_that_was_cancelled_is_asked_of_no_other_model(tmp_path: Path) -> None:
    script = """
        const chat = await connect(url);
        const stop = new AbortController();
        const load = thrown(chat.init({ model: "test/more" }, { signal: stop.signal }));
        const answer = thrown(chat.generate({ prompt: "hi" }).text());
        await told();
        stop.abort();
        say((await load).code);
        say((await answer).code);
    """
    async with scripted(allow_host=PROXIED) as (server, model), line(server) as (proxy, url):
        more = put(server.models, "test/more")
        more.load_gate.shut()
        async with node(tmp_path, url, script) as running:
            await in_engine(server, 1)
            running.tell()
            assert await running.says() == "cancelled"
            (await last_link(proxy)).cut()
            assert await running.says() == "cancelled"
            assert model.steps == []
            more.open()


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
