"""Keys when a server starts, and when it reads them anew: where it needs some, where they come from, and what it tells."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.conftest import Client, eventually
from tests.test_auth import KEY, WRONG, bearer
from tests.test_main import COMMAND, ON_ECHO, Process, failed, process
from tests.test_websocat import WEBSOCAT
from wsserver import __main__ as main_module
from wsserver import keys_file
from wsserver.auth import new_key
from wsserver.config import Config


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
async def test_without_keys_a_server_that_others_could_reach_does_not_start(tmp_path: Path, host: str):
    code, stderr = await failed(tmp_path, *ON_ECHO, "--host", host)
    assert code == 1
    assert re.fullmatch(r"wsserver: --host: .*wsserver key add NAME.*WSSERVER_API_KEY.*--insecure on\n", stderr)


async def test_a_file_without_keys_is_refused_wherever_the_server_listens(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(keys_file.FIRST_LINE)
    for more in ([], ["--insecure", "on"]):
        code, stderr = await failed(tmp_path, *ON_ECHO, "--api-keys-file", str(path), *more)
        assert code == 1
        assert stderr == f"wsserver: --api-keys-file: {path} has no keys, so nobody could come in; " + (
            "`wsserver key add NAME` makes one\n"
        )


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, *options: str, **environment: str) -> AsyncIterator[Process]:
    async with process(tmp_path, *COMMAND, *ON_ECHO, *options, **environment) as running:
        assert "serving" in await running.says()
        await running.says()
        yield running


async def test_insecure_is_what_lets_it_start_all_the_same(tmp_path: Path):
    async with (
        serving(tmp_path, "--host", "0.0.0.0", "--insecure", "on") as server,
        connect(server.url) as socket,
    ):
        assert (await Client(socket).generate(prompt="hello"))["joined"] == "hello"


async def test_a_key_in_the_environment_opens_every_address_to_who_has_it_and_nobody_is_told(tmp_path: Path):
    async with serving(tmp_path, "--host", "0.0.0.0", "--log-level", "debug", WSSERVER_API_KEY=KEY) as server:
        # The line that says how to try it asks for the key, and does not have it.
        assert "-H='Authorization: Bearer KEY' 'ws://" in server.said[1]
        async with connect(server.url, **bearer(KEY)) as socket:
            assert (await Client(socket).generate(prompt="hello"))["joined"] == "hello"
        with pytest.raises(InvalidStatus, match="401"):
            await connect(server.url, **bearer(WRONG))
        server.signal()
        assert await server.ends() == 0
        assert not re.search("sk-", server.stderr + "".join(server.said))
        assert "127.0.0.1: a wrong key" in server.stderr


async def test_the_line_that_says_how_to_try_it_works_once_the_key_is_put_in(tmp_path: Path):
    async with serving(tmp_path, WSSERVER_API_KEY=KEY) as server:
        echo, websocat = server.said[1].removeprefix("try:  ").split(" | ")
        words = shlex.split(websocat.replace("KEY", KEY))[1:]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        terminal = await asyncio.create_subprocess_exec(WEBSOCAT, *words, **pipes)  # type: ignore[arg-type]
        try:
            assert terminal.stdin
            assert terminal.stdout
            terminal.stdin.write(shlex.split(echo)[1].encode() + b"\n")
            kinds = [json.loads(await terminal.stdout.readline())["type"]]
            while kinds[-1] != "done":
                kinds.append(json.loads(await terminal.stdout.readline())["type"])
            assert "token" in kinds
        finally:
            terminal.kill()
            await terminal.wait()


def test_what_the_server_starts_does_not_get_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WSSERVER_API_KEY", KEY)
    keys, certified, reads = main_module._secured(Config())
    assert keys.whose(KEY) == "default"
    assert "WSSERVER_API_KEY" not in os.environ
    assert (certified, reads) == (None, {}), "there is nothing that SIGHUP could read anew, so it does what it always does"


async def test_a_bad_key_in_the_environment_is_told_and_not_repeated(tmp_path: Path):
    async with process(tmp_path, *COMMAND, *ON_ECHO, WSSERVER_API_KEY="hunter2") as running:
        assert await running.ends() == 1
        assert running.stderr.startswith("wsserver: WSSERVER_API_KEY: a key has 16 characters or more")
        assert "hunter2" not in running.stderr


async def test_on_sighup_the_file_is_read_anew_and_open_connections_stay(tmp_path: Path):
    path = tmp_path / "keys"
    alice, bob = keys_file.add(path, "alice"), keys_file.add(path, "bob")
    environment = {"WSSERVER_API_KEY": KEY}
    async with serving(tmp_path, "--api-keys-file", str(path), **environment) as server:
        async with connect(server.url, **bearer(alice)) as socket, connect(server.url, **bearer(bob)) as other:
            known = Client(socket)
            keys_file.remove(path, "alice")
            carol = keys_file.add(path, "carol")
            with pytest.raises(InvalidStatus, match="401"):
                await connect(server.url, **bearer(carol))
            server.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "the file of keys was read anew" in server.stderr)
            with pytest.raises(InvalidStatus, match="401"):
                await connect(server.url, **bearer(alice))
            for key in (bob, carol, KEY):
                async with connect(server.url, **bearer(key)):
                    pass
            assert (await known.generate(prompt="hello"))["joined"] == "hello"
            assert (await Client(other).generate(prompt="hello"))["joined"] == "hello"
        # What cannot be read changes nothing; an empty file lets nobody in any more but the environment's key.
        before = path.read_text()
        path.write_text(before + new_key())
        server.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "the file of keys stays as it was: --api-keys-file" in server.stderr)
        assert "sk-" not in server.stderr
        async with connect(server.url, **bearer(bob)):
            pass
        path.write_text("")
        server.process.send_signal(signal.SIGHUP)
        await eventually(lambda: server.stderr.count("was read anew") == 2)
        with pytest.raises(InvalidStatus, match="401"):
            await connect(server.url, **bearer(bob))
        async with connect(server.url, **bearer(KEY)):
            pass
