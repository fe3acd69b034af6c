"""The command line as its user sees it: processes, their output, their signals and their exit codes."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from LLM.errors import Refused
from LLM.model import Description
from LLM.model_service import ModelService
from tests.conftest import ECHO, Client, add_folder, eventually
from tests.scripted import ScriptedModel, closing_code, put
from wsserver import __main__ as main_module
from wsserver import protocol
from wsserver.__main__ import EPHEMERAL
from wsserver.config import COMMANDS, Config
from wsserver.server import Server

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "wsserver"]
ON_ECHO = ["--model", ECHO, "--port", "0"]
LONG = {"prompt": "x" * 100, "ignore_eos": True, "max_tokens": 60_000}


class Process:
    """A running server: where it says it serves, and what it has written."""

    def __init__(self, process: asyncio.subprocess.Process, stderr: Path) -> None:
        self.process = process
        self.said: list[str] = []
        self._stderr = stderr

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def url(self) -> str:
        return self.said[0].rpartition(" ")[2]

    async def says(self) -> str:
        assert self.process.stdout
        self.said.append((await self.process.stdout.readline()).decode().rstrip("\n"))
        return self.said[-1]

    async def ends(self) -> int:
        while await self.says():
            pass
        return await self.process.wait()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    @contextlib.asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        async with connect(self.url, compression=None, **options) as socket:
            yield Client(socket)


@contextlib.asynccontextmanager
async def process(tmp_path: Path, *command: str, cwd: Path = ROOT, **environment: str) -> AsyncIterator[Process]:
    stderr = tmp_path / "stderr"
    with stderr.open("wb") as file:
        started = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=file, cwd=cwd, env=os.environ | environment
        )
    try:
        yield Process(started, stderr)
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, *options: str) -> AsyncIterator[Process]:
    async with process(tmp_path, *COMMAND, *ON_ECHO, *options) as running:
        assert re.fullmatch(rf"serving {ECHO} \(none on cpu\) at ws://127\.0\.0\.1:[0-9]+/ws", await running.says())
        await running.says()
        yield running


# Serving.


async def test_it_says_where_it_serves_and_how_to_try_it_and_answers(tmp_path: Path):
    async with serving(tmp_path) as running, running.client() as client:
        message, url = re.fullmatch(r"try:  echo '(\{.*\})' \| websocat -n '(ws://\S+)'", running.said[1]).groups()
        assert url == f"{running.url}?once=1"
        assert await running.says() == f"chat: {running.url.replace('ws://', 'http://').removesuffix('ws')}"
        await client.send(**json.loads(message))
        done = await client.until("done")
        assert client.checker.texts[done["id"]] == json.loads(message)["prompt"]


async def test_the_environment_sets_what_the_command_line_leaves_open(tmp_path: Path):
    environment = {"WSSERVER_MODEL": ECHO, "WSSERVER_PORT": "1", "WSSERVER_MAX_ACTIVE": "3"}
    async with process(tmp_path, *COMMAND, "--port", "0", **environment) as running:
        assert await running.says()
        async with running.client() as client:
            await client.send(type="init", id="i")
            assert (await client.until("ready"))["limits"]["max_active"] == 3


async def test_torch_is_not_imported_while_only_echo_is_served(tmp_path: Path):
    async with process(tmp_path, sys.executable, "-X", "importtime", "-m", "wsserver", *ON_ECHO) as running:
        assert await running.says()
        async with running.client() as client:
            await client.generate(prompt="hi")
        running.signal()
        assert await running.ends() == 0
        imported = {line.rpartition("|")[2].strip() for line in running.stderr.splitlines()}
        assert {"wsserver.server", "LLM.engine.thread"} <= imported
        assert {name for name in imported if name.partition(".")[0] in ("torch", "transformers", "numpy")} == set()
        # It reads at its import whether it may ask a hub, and that is said later.
        assert "huggingface_hub" not in imported


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_idle_server_and_closes_its_clients(tmp_path: Path, number: int):
    async with serving(tmp_path) as running, running.client() as client:
        await client.send(type="status")
        await client.until("status")
        running.signal(number)
        await client.until("goaway")
        assert await closing_code(client) == 1012
        assert await running.ends() == 0
        assert "Traceback" not in running.stderr


async def test_a_signal_lets_what_runs_and_waits_come_to_its_end(tmp_path: Path):
    async with serving(tmp_path, "--max-active", "1", "--drain-timeout", "60") as running, running.client() as client:
        for id in "abc":
            await client.send(type="generate", id=id, **LONG | {"max_tokens": 20_000})
        await client.until("token", id="a")
        running.signal()
        assert 50_000 < (await client.until("goaway"))["deadline_ms"] <= 55_000
        while len(client.checker.dones) < 3:
            await client.until("done")
        assert {done["id"]: done["finish_reason"] for done in client.checker.dones} == dict.fromkeys("abc", "length")
        assert await closing_code(client) == 1012
        assert await running.ends() == 0


async def test_what_is_not_done_by_the_deadline_is_shut_down(tmp_path: Path):
    async with serving(tmp_path, "--max-active", "1", "--drain-timeout", "0") as running, running.client() as client:
        for id in "abcdefgh":
            await client.send(type="generate", id=id, **LONG)
        await client.until("token", id="a")
        running.signal()
        await client.until("goaway")
        while len(client.checker.dones) < 8:
            await client.until("done")
        assert client.checker.dones[-1]["finish_reason"] == "shutdown"
        assert await closing_code(client) == 1012
        assert await running.ends() == 0


async def test_a_second_signal_ends_the_process_where_it_stands(tmp_path: Path):
    async with serving(tmp_path, "--max-active", "1", "--drain-timeout", "600") as running, running.client() as client:
        for i in range(100):
            await client.send(type="generate", id=str(i), **LONG)
        running.signal()
        await client.until("goaway")
        running.signal()
        assert await running.ends() == 1
        with pytest.raises(ConnectionClosed) as closed:
            await client.until("nothing comes any more")
        assert closed.value.rcvd is None
        assert len(client.checker.dones) < 100


# What hangs does not hold up the end.


async def test_a_folder_that_hangs_is_told_and_does_not_hold_up_the_end(tmp_path: Path):
    """A FIFO without a writer stands for a file of a network file system whose server is gone."""
    add_folder(tmp_path, "acme/hung")
    config = tmp_path / "acme" / "hung" / "config.json"
    config.unlink()
    os.mkfifo(config)
    options = ["--models", str(tmp_path), "--drain-timeout", "1", "--step-timeout", "1"]
    options += ["--handshakes-per-second", "10000"]  # it asks /readyz again and again
    async with serving(tmp_path, *options) as running, running.client() as client, running.client() as other:
        await client.send(type="init", id="i", model="acme/hung")
        assert (await other.generate(prompt="hi"))["joined"] == "hi", "others are served beside it"
        ready = running.url.replace("ws://", "http://").replace("/ws", "/readyz")
        while (told := await asyncio.to_thread(body, ready)) != "reading a model's folder hangs\n":
            assert told == "ready\n"
        running.signal()
        assert await running.ends() == 0


STUCK = """
from dataclasses import replace

from LLM.chat.template import ChatTemplate
from LLM.model_srv_wsserver_echo import ModelHandler as Echo


class ModelHandler(Echo):
    model_ids = ("acme/stuck",)

    def load(self, *args):
        return replace(super().load(*args), chat_template=ChatTemplate("{{ 9**(9**9) }}", {}, 3600.0))

    def encode_prompt(self, model, prompt):
        return [open("FIFO").read()]

    def encode_chat(self, model, messages):
        open("FIFO").close()
        return model.chat_template(messages)
"""


@pytest.mark.parametrize("cancelled", [True, False])
@pytest.mark.parametrize("kind", ["prompt", "messages"])
async def test_a_prompt_whose_reading_hangs_does_not_hold_up_the_end(tmp_path: Path, kind: str, cancelled: bool):
    """A drop-in that reads for ever stands for a tokenizer, and its template for an endless one."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "model_srv_acme_stuck.py").write_text(STUCK.replace("FIFO", str(fifo)))
    options = ["--models", str(tmp_path), "--drain-timeout", "1"]
    asked = {"prompt": "x"} if kind == "prompt" else {"messages": [{"role": "user", "content": "x"}]}
    elsewhere = ("127.0.0.2", 0)  # another client's address
    async with (
        serving(tmp_path, *options) as running,
        running.client() as client,
        running.client(local_addr=elsewhere) as other,
    ):
        await client.send(type="init", model="acme/stuck")
        await client.until("ready")
        await client.send(type="generate", id="g", **asked)
        writer = await opened_by_a_reader(fifo)
        try:
            if cancelled:
                await client.send(type="cancel", id="g")
                assert (await client.until("done"))["finish_reason"] == "cancelled"
            assert (await other.generate(prompt="hi"))["joined"] == "hi"
            running.signal()
            assert await running.ends() == 0
        finally:
            os.close(writer)


async def opened_by_a_reader(fifo: Path) -> int:
    """Open a FIFO to write, once somebody reads from it."""
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            await asyncio.sleep(0)


def body(url: str) -> str:
    try:
        with urllib.request.urlopen(url) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


async def test_sighup_ends_nothing_also_where_there_is_nothing_to_read_anew(tmp_path: Path):
    async with serving(tmp_path) as running, running.client() as client:
        running.signal(signal.SIGHUP)
        assert (await client.generate(prompt="hi"))["joined"] == "hi"
        await eventually(lambda: "SIGHUP: there is no file of keys or certificates to read" in running.stderr)
        running.signal()
        assert await running.ends() == 0


# Not starting.


async def failed(tmp_path: Path, *options: str) -> tuple[int, str]:
    async with process(tmp_path, *COMMAND, *options) as running:
        code = await running.ends()
        assert running.said == [""], "it said that it serves"
        return code, running.stderr


async def test_a_port_in_use_is_told_in_one_line(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, stderr = await failed(tmp_path, "--model", ECHO, "--port", str(port))
    assert code == 1
    assert re.fullmatch(
        rf"wsserver: .*{port}.*address already in use.*; choose another address with --host and --port\n", stderr
    )


async def test_a_port_that_an_outgoing_connection_has_is_told_with_what_keeps_it_free(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as outgoing:
        port = outgoing.getsockname()[1]
        if port not in EPHEMERAL:
            pytest.skip("this machine gives other ports to outgoing connections")
        code, stderr = await failed(tmp_path, "--model", ECHO, "--port", str(port))
    assert code == 1
    assert stderr.count("\n") == 1
    assert f"sysctl net.ipv4.ip_local_reserved_ports={port}" in stderr


async def test_an_unknown_model_is_told_in_one_line_with_those_there_are(tmp_path: Path):
    code, stderr = await failed(tmp_path, "--model", "../../etc", "--port", "0")
    assert code == 1
    assert re.fullmatch(rf"wsserver: --model: .*{ECHO}.*\n", stderr)


async def test_an_address_that_is_not_ours_is_told_in_one_line(tmp_path: Path):
    code, stderr = await failed(tmp_path, "--model", ECHO, "--port", "0", "--host", "192.0.2.1")
    assert code == 1
    assert re.fullmatch(r"wsserver: .*192\.0\.2\.1.*\n", stderr)


async def test_a_bad_option_is_told_with_the_usage(tmp_path: Path):
    code, stderr = await failed(tmp_path, "--port", "seventy")
    assert code == 2
    assert stderr.startswith("usage: wsserver")
    assert "--port: 'seventy' is no port" in stderr.splitlines()[-1]


# Other commands.


def test_every_command_does_something():
    assert main_module.COMMANDS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", [COMMAND, [str(Path(sys.executable).parent / "wsserver")]], ids=["module", "installed"])
async def test_schema_prints_the_json_schema_of_all_messages(tmp_path: Path, command: list[str]):
    async with process(tmp_path, *command, "schema") as running:
        printed, _ = await running.process.communicate()
        assert await running.process.wait() == 0
    schema = orjson.loads(printed)
    assert schema == orjson.loads(orjson.dumps(protocol.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"type": "generate", "prompt": "hi"}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"type": "generate", "prompt": 5}, schema)


async def test_models_lists_what_there_is_and_torch_is_not_imported_for_folders_that_cannot_be_loaded(tmp_path: Path):
    add_folder(tmp_path, "acme/broken")
    (tmp_path / "model_srv_acme_other.py").write_text("1 / 0")
    listing = [sys.executable, "-X", "importtime", "-m", "wsserver", "models", "--models", str(tmp_path)]
    async with process(tmp_path, *listing) as running:
        printed, _ = await running.process.communicate()
        assert await running.process.wait() == 0
        imported = {line.rpartition("|")[2].strip() for line in running.stderr.splitlines()}
        assert "ZeroDivisionError: division by zero" in running.stderr
    assert [line.split()[0] for line in printed.decode().splitlines()] == ["MODEL", "acme/broken", ECHO]
    assert {name for name in imported if name.partition(".")[0] in ("torch", "transformers", "numpy")} == set()


async def test_models_may_lie_in_another_folder(tmp_path: Path):
    code, stderr = await failed(tmp_path, "--models", str(tmp_path), "--port", "0")
    assert code == 1
    # The default model is not there: what would put it into its usual folder is no help.
    assert stderr == f"wsserver: --model: this server has no such model; it has: {ECHO}\n"
    async with serving(tmp_path, "--models", str(tmp_path)) as running, running.client() as client:
        assert (await client.generate(prompt="hi"))["joined"] == "hi"


async def test_help_names_every_option_and_the_environment(tmp_path: Path):
    async with process(tmp_path, *COMMAND, "--help") as running:
        printed, _ = await running.process.communicate()
        assert await running.process.wait() == 0
    text = printed.decode()
    for option in ("host", "port", "model", "device", "dtype", "max-active", "drain-timeout", "log-level"):
        assert f"--{option} " in text
    assert "WSSERVER_MAX_ACTIVE" in text


async def test_fetch_is_the_one_beside_the_server_wherever_it_is_started(tmp_path: Path):
    (tmp_path / "LLM").mkdir()
    (tmp_path / "LLM" / "__init__.py").write_text("1 / 0")
    # Started as the installed command is, whose path has no current folder in it.
    start = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv[0] = 'wsserver'; from wsserver.__main__ import main; main()"
    )
    command = [sys.executable, "-P", "-c", start, "fetch", "--models", str(tmp_path), "../x"]
    async with process(tmp_path, *command, PYTHONPATH=str(ROOT)) as running:
        assert await running.ends() == 1
        assert running.stderr == (
            "wsserver fetch: '../x': this is no id of a model; ids look like HuggingFaceTB/SmolLM2-135M-Instruct\n"
        )


def test_no_library_may_ask_a_hub_for_anything_once_there_is_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(sys, "argv", ["wsserver", "schema"])
    main_module.main()
    assert capsys.readouterr().out
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# While the default model loads.


MORE = "test/more"


class Serving:
    """`serve` in this process, with a scripted default model; its load stands until it is let on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = ScriptedModel()
        self.model.load_gate.shut()
        self.servers: list[Server] = []
        self.more: ScriptedModel | None = None
        self.models: ModelService | None = None
        serving = self

        class Models(ModelService):
            def __init__(self, *args: object, **more: object) -> None:
                super().__init__(*args, **more)  # type: ignore[arg-type]
                put(self, ECHO, serving.model)
                serving.more = put(self, MORE)
                serving.models = self

        class Watched(Server):
            def __init__(self, *args: object, **more: object) -> None:
                super().__init__(*args, **more)  # type: ignore[arg-type]
                serving.servers.append(self)

        monkeypatch.setattr(main_module, "ModelService", Models)
        monkeypatch.setattr(main_module, "Server", Watched)

    async def start(self, drain_timeout: float = 60, **settings: Any) -> "asyncio.Task[None]":
        config = Config(port=0, model=ECHO, drain_timeout=drain_timeout, **settings)
        task = asyncio.create_task(main_module.serve(config))
        await self.model.in_load_stage(1)
        return task


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Serving:
    return Serving(monkeypatch)


async def test_a_signal_during_the_first_load_ends_the_server(loading: Serving, capsys: pytest.CaptureFixture[str]):
    served = await loading.start()
    signal.raise_signal(signal.SIGTERM)
    await served
    assert capsys.readouterr().out == "stopping: running generations may finish\n"
    loading.model.open()


async def test_a_client_that_waits_for_the_first_load_is_told_of_the_end(loading: Serving):
    served = await loading.start(drain_timeout=0)
    async with connect(f"ws://127.0.0.1:{loading.servers[0].port}/ws") as socket:
        client = Client(socket)
        await client.send(type="generate", id="g", prompt="hi")
        await client.until("queued")
        signal.raise_signal(signal.SIGTERM)
        await client.until("goaway")
        assert (await client.until("done"))["finish_reason"] == "shutdown"
        assert await closing_code(client) == 1012
    await served
    loading.model.open()


async def test_a_first_load_that_fails_ends_the_server(loading: Serving, capsys: pytest.CaptureFixture[str]):
    loading.model.load_errors.append(Refused("load_failed", "the folder is empty"))
    served = await loading.start()
    loading.model.open()
    with pytest.raises(Refused, match="the folder is empty"):
        await served
    assert capsys.readouterr().out == ""


async def test_models_to_preload_are_loaded_with_the_default_one(loading: Serving, capsys: pytest.CaptureFixture[str]):
    # Named twice, it is loaded once.
    served = await loading.start(preload=(MORE, ECHO))
    loading.model.open()
    assert loading.models
    assert loading.more
    await eventually(lambda: "serving" in capsys.readouterr().out)
    assert [entry["id"] for entry in loading.models.status()] == [ECHO, MORE]
    assert (loading.model.loads, loading.more.loads) == (1, 1)
    signal.raise_signal(signal.SIGTERM)
    await served


async def test_models_to_preload_that_do_not_fit_together_end_the_server(loading: Serving):
    served = await loading.start(preload=(MORE,), memory=ScriptedModel.memory_bytes)
    loading.model.open()
    with pytest.raises(Refused, match=f"in use or always kept loaded: {ECHO};"):
        await served


async def test_a_model_to_preload_that_is_not_there_ends_the_server(loading: Serving):
    with pytest.raises(Refused, match="no such model"):
        await main_module.serve(Config(port=0, model=ECHO, preload=("nobody/knows",)))


@pytest.mark.parametrize(
    ("quantization", "shown"), [("none", "a/b (bfloat16 on cuda:0)"), ("nf4", "a/b (nf4 and bfloat16 on cuda:0)")]
)
def test_the_first_line_tells_at_which_precision_a_model_runs(quantization: str, shown: str):
    about: Description = {
        "id": "a/b",
        "context_length": 8,
        "dtype": "bfloat16",
        "quantization": quantization,
        "device": "cuda:0",
    }
    assert main_module._in_words(about) == shown
