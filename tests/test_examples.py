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

import pytest

from tests.conftest import Running, eventually
from tests.scripted import ScriptedModel, scripted
from tests.torture.proxy import PROXIED, Proxy

EXAMPLES = Path(__file__).parent.parent / "examples"
NODE = shutil.which("node")

# What a page is to the script of the browser's example.
PAGE = """
const elements = { "#answer": { append: (text) => process.stdout.write(text) }, "#ask": {}, "#stop": {} };
globalThis.document = { querySelector: (name) => elements[name] };
const press = (name) => elements[name].onclick();
"""
WHEN_OPEN = """
server.addEventListener("open", () => press("#ask"), { once: true });
setInterval(() => resume === null && process.exit(0), 10);
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


@pytest.mark.skipif(NODE is None, reason="needs node, to run the browser's script")
async def test_the_browser_example_takes_its_answer_up_after_a_cut(tmp_path: Path) -> None:
    page = (EXAMPLES / "stream_and_stop.html").read_text()
    found = re.search(r'<script type="module">\n(.*?)</script>', page, re.DOTALL)
    assert found
    async with scripted(allow_host=PROXIED) as (server, model), cut_in_the_middle(server, model) as url:
        script = tmp_path / "page.mjs"
        script.write_text(PAGE + found[1].replace("ws://127.0.0.1:41443/ws", url) + WHEN_OPEN)
        assert NODE
        printed = await printed_by(NODE, "--experimental-websocket", "--no-warnings", str(script))
        assert printed == "Tell me a story. [stop]\n"
