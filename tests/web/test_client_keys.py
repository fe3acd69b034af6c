"""client.js where the server asks for a key."""

from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.scripted import put, scripted
from tests.test_auth import names
from tests.torture.proxy import PROXIED
from tests.web.node import NEEDS_NODE, node
from tests.web.test_client_reconnects import TEXT, last_link, line
from wsserver.auth import Keys, digest

pytestmark = NEEDS_NODE


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
