"""Runs a piece of JavaScript in Node with client.js at hand, in step with the test."""

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).parent.parent.parent / "wsserver" / "web"
NODE = shutil.which("node") or "node"
FLAGS = ("--experimental-websocket", "--no-warnings")  # Node 22 knows WebSockets without being told so
PATIENCE = 30.0


def _knows_sockets() -> bool:
    return bool(shutil.which(NODE)) and not subprocess.run([NODE, *FLAGS, "-e", "WebSocket"], capture_output=True).returncode


NEEDS_NODE = pytest.mark.skipif(not _knows_sockets(), reason="needs Node 20 or newer")

# `say` tells the test a value, `told` waits for a word of the test.
BEFORE = """
import { createInterface } from "node:readline";
import { connect, ServerError } from "./client.mjs";
const url = process.argv[2];
const say = (value) => process.stdout.write(JSON.stringify(value) + "\\n");
const words = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const told = async () => (await words.next()).value;
const thrown = async (promise) => {
  try {
    return await promise;
  } catch ({ name, code, message, retryAfterMs }) {
    return { name, code, message, retryAfterMs };
  }
};
"""
AFTER = "\nprocess.exit(0);\n"


class Script:
    """A script that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self) -> Any:
        """Give the next value that the script tells."""
        assert self.process.stdout
        async with asyncio.timeout(PATIENCE):
            line = await self.process.stdout.readline()
        assert line, "the script has ended"
        return json.loads(line)

    def tell(self, word: str = "go on") -> None:
        """Say a word to the script."""
        assert self.process.stdin
        self.process.stdin.write(word.encode() + b"\n")


@contextlib.asynccontextmanager
async def node(folder: Path, url: str, script: str) -> AsyncIterator[Script]:
    """Run a script in a folder; it must have ended well when this is left."""
    # Only a name that ends so is a module to every version of Node.
    shutil.copyfile(WEB / "client.js", folder / "client.mjs")
    (folder / "script.mjs").write_text(BEFORE + script + AFTER)
    command = (NODE, *FLAGS, str(folder / "script.mjs"), url)
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*command, **pipes)
    try:
        yield Script(process)
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
