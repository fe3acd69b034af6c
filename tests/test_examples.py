"""The examples, run as their reader would, over a connection that is cut in the middle of the answer."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from playwright.async_api import expect

from tests.conftest import Running, eventually, stopping
from tests.scripted import ScriptedModel, scripted
from tests.torture.proxy import PROXIED, Proxy
from tests.web.chromium import NEEDS_CHROMIUM, chromium
from tests.web.node import FLAGS, NEEDS_NODE, NODE, WEB

EXAMPLES = Path(__file__).parent.parent / "examples"
ADDRESS = "ws://127.0.0.1:41443/ws"

# What a page is to the script of the browser's example, and what its user does.
BEFORE = """
const elements = { "#answer": { append: (text) => process.stdout.write(text) }, "#ask": {}, "#stop": {} };
globalThis.document = { querySelector: (name) => elements[name] };
"""
AFTER = """
await elements["#ask"].onclick();
process.exit(0);
"""


@contextlib.asynccontextmanager
async def cut_in_the_middle(server: Running, model: ScriptedModel) -> AsyncIterator[str]:
    """Give the address of a way to the server that is cut after some tokens; the rest comes after that."""
    async with Proxy(server.server.port) as proxy:

        async def cut() -> None:
            kept = server.server.resumables
            await eventually(lambda: len(kept) == 1, 30)
            model.step_gate.let(7)
            await eventually(lambda: all(job.transcript and job.transcript.tokens > 4 for job in kept), 30)
            (link,) = proxy.links.values()
            link.cut()
            await eventually(lambda: all(job.listener is None for job in kept), 30)
            model.open()

        cutting = asyncio.create_task(cut())
        yield f"ws://127.0.0.1:{proxy.port}/ws"
        await cutting
        assert len(proxy.links) > 1


async def printed_by(*command: str, **environment: str) -> str:
    beside = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)} | environment
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=beside)
    async with asyncio.timeout(60):
        printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


async def test_the_python_example_takes_its_answer_up_after_a_cut() -> None:
    async with scripted(allow_host=PROXIED) as (server, model), cut_in_the_middle(server, model) as url:
        printed = await printed_by(sys.executable, str(EXAMPLES / "stream_and_stop.py"), url)
        assert printed == "Once upon a time\n[stop after 17 tokens]\n"


async def test_the_shells_example_prints_one_answer_and_ends(tmp_path: Path) -> None:
    async with scripted() as (server, model):
        model.open()
        script = tmp_path / "one_answer.sh"
        script.write_text((EXAMPLES / "one_answer.sh").read_text().replace("ws://127.0.0.1:41443/ws", server.url))
        printed = await printed_by("sh", str(script), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    frames = [json.loads(line) for line in printed.splitlines()]
    assert (frames[0]["type"], frames[-1]["type"], frames[-1]["finish_reason"]) == ("started", "done", "length")
    assert "".join(frame["text"] for frame in frames[1:-1]) == "The capi"


@NEEDS_NODE
async def test_the_node_example_takes_its_answer_up_after_a_cut() -> None:
    async with scripted(allow_host=PROXIED) as (server, model), cut_in_the_middle(server, model) as url:
        printed = await printed_by(NODE, *FLAGS, str(EXAMPLES / "stream_and_stop.mjs"), url)
        assert printed == "Once upon a time\n[stop after 17 tokens]\n"


@NEEDS_NODE
async def test_the_browser_example_takes_its_answer_up_after_a_cut(tmp_path: Path) -> None:
    page = (EXAMPLES / "stream_and_stop.html").read_text()
    found = re.search(r'<script type="module">\n(.*?)</script>', page, re.DOTALL)
    assert found
    async with scripted(allow_host=PROXIED) as (server, model), cut_in_the_middle(server, model) as url:
        shutil.copyfile(WEB / "client.js", tmp_path / "client.mjs")
        code = found[1].replace("http://127.0.0.1:41443/client.js", "./client.mjs").replace(ADDRESS, url)
        (tmp_path / "page.mjs").write_text(BEFORE + code + AFTER)
        printed = await printed_by(NODE, *FLAGS, str(tmp_path / "page.mjs"))
        assert printed == "Tell me a story. [stop]\n"


@NEEDS_CHROMIUM
async def test_the_browser_example_works_as_a_file_that_is_opened(tmp_path: Path) -> None:
    async with scripted(allow_origin=("null",)) as (server, model), chromium() as browser:
        page = (EXAMPLES / "stream_and_stop.html").read_text()
        (tmp_path / "page.html").write_text(page.replace("127.0.0.1:41443", f"127.0.0.1:{server.server.port}"))
        tab = await browser.new_page()
        await tab.goto((tmp_path / "page.html").as_uri())
        await tab.wait_for_function("document.querySelector('#ask').onclick !== null")
        model.step_gate.let(4)
        await tab.get_by_role("button", name="Ask").click()
        await expect(tab.locator("#answer")).to_have_text("Tell")
        await tab.get_by_role("button", name="Stop").click()
        await stopping(server)
        model.open()
        await expect(tab.locator("#answer")).to_have_text("Tell [cancelled]")
