"""TLS at the socket: what is spoken, how a certificate is changed, and that a slow peer is found through it too."""

import asyncio
import contextlib
import re
import shlex
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from tests.conftest import ECHO, Client, Running, eventually, running
from tests.scripted import WIDE, closing_code, in_engine, scripted
from tests.test_main import COMMAND, ON_ECHO, Process, failed, process
from tests.test_tcp import traffic
from wsserver.__main__ import new_event_loop
from wsserver.config import BadSetting
from wsserver.tls import load, server_context

README = (Path(__file__).parent.parent / "README.md").read_text()
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, new_event_loop]


def make(folder: Path) -> tuple[str, str]:
    """Make a certificate as the README says; give the files of it and of its key."""
    folder.mkdir(exist_ok=True)
    (command,) = re.findall(r"^openssl req (?:.*\\\n)*.*$", README, re.MULTILINE)
    subprocess.run(shlex.split(command.replace("\\\n", "")), cwd=folder, check=True, capture_output=True)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def with_password(key: str, folder: Path) -> str:
    locked = str(folder / "locked.pem")
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked], check=True)
    return locked


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make(tmp_path_factory.mktemp("tls"))


def trusting(certificate: str, **settings: Any) -> ssl.SSLContext:
    """Give a client's context that trusts one certificate, and no other."""
    context = ssl.create_default_context(cafile=certificate)
    for name, value in settings.items():
        setattr(context, name, value)
    return context


@contextlib.asynccontextmanager
async def secured(files: tuple[str, str], **settings: Any) -> AsyncIterator[Running]:
    async with running(tls=server_context(*files), **settings) as server:
        yield server


def serial(client: Client) -> str:
    """Give the serial number of the certificate that a client was shown."""
    shown = client.socket.transport.get_extra_info("ssl_object").getpeercert()
    return str(shown["serialNumber"])


# What is spoken.


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_an_answer_streams_over_tls_and_health_is_told(files: tuple[str, str], version: ssl.TLSVersion):
    async with secured(files) as server:
        assert server.url.startswith("wss://")
        trust = trusting(files[0], maximum_version=version)
        async with server.client(ssl=trust, origin=f"https://127.0.0.1:{server.server.port}") as client:
            assert (await client.generate(prompt="hello"))["joined"] == "hello"
        reader, writer = await asyncio.open_connection("localhost", server.server.port, ssl=trust)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_what_is_older_than_1_2_is_refused(files: tuple[str, str]):
    async with secured(files) as server:
        assert server.server.tls
        assert server.server.tls.minimum_version == ssl.TLSVersion.TLSv1_2
        old = trusting(files[0])
        old.set_ciphers("DEFAULT@SECLEVEL=0")
        old.minimum_version = ssl.TLSVersion.TLSv1_1
        async with server.client(ssl=old):
            pass
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await connect(server.url, ssl=old)


async def test_who_speaks_no_tls_gets_nothing_and_the_others_notice_nothing(
    files: tuple[str, str], caplog: pytest.LogCaptureFixture
):
    async with secured(files) as server, server.client(ssl=trusting(files[0])) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in await reader.read()
        writer.close()
        assert (await client.generate(prompt="hello"))["joined"] == "hello"
        assert caplog.text == ""


# The files.


def test_without_files_there_is_no_tls_and_one_alone_is_refused(files: tuple[str, str]):
    assert server_context("", "") is None
    for one in ((files[0], ""), ("", files[1])):
        with pytest.raises(BadSetting, match="--tls-cert and --tls-key: give both"):
            server_context(*one)


def test_one_file_may_hold_both(files: tuple[str, str], tmp_path: Path):
    both = tmp_path / "both.pem"
    both.write_text("".join(Path(file).read_text() for file in files))
    assert server_context(str(both), str(both))


async def test_files_that_cannot_be_used_are_told_in_one_line(files: tuple[str, str], tmp_path: Path):
    _, other = make(tmp_path / "other")
    for key, why in ((other, "KEY_VALUES_MISMATCH"), (files[0], ".+"), (with_password(files[1], tmp_path), ".+")):
        code, stderr = await failed(tmp_path, *ON_ECHO, "--tls-cert", files[0], "--tls-key", key)
        assert code == 1
        assert re.fullmatch(rf"wsserver: --tls-cert, --tls-key: {re.escape(files[0])}, {re.escape(key)}: {why}\n", stderr)


async def test_a_pair_that_does_not_match_leaves_the_one_in_use_as_it_was(files: tuple[str, str], tmp_path: Path):
    certificate, _ = make(tmp_path / "other")
    context = server_context(*files)
    assert context
    with pytest.raises(BadSetting):
        load(context, certificate, files[1])
    async with running(tls=context) as server, server.client(ssl=trusting(files[0])) as client:
        assert (await client.generate(prompt="hello"))["joined"] == "hello"


# A process, with the event loop that it has.


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, files: tuple[str, str], *options: str) -> AsyncIterator[Process]:
    command = [*COMMAND, *ON_ECHO, "--tls-cert", files[0], "--tls-key", files[1], *options]
    async with process(tmp_path, *command) as started:
        assert re.fullmatch(rf"serving {ECHO} \(none on cpu\) at wss://127\.0\.0\.1:[0-9]+/ws", await started.says())
        assert "websocat -n 'wss://" in await started.says()
        yield started


async def test_a_drain_over_tls_lets_what_runs_finish_and_closes_with_1012(tmp_path: Path, files: tuple[str, str]):
    async with (
        serving(tmp_path, files, "--drain-timeout", "60") as server,
        connect(server.url, ssl=trusting(files[0])) as socket,
    ):
        client = Client(socket)
        await client.send(type="generate", id="g", prompt="x" * 100, ignore_eos=True, max_tokens=20_000)
        await client.until("token")
        server.signal()
        await client.until("goaway")
        assert (await client.done("g"))["finish_reason"] == "length"
        assert await closing_code(client) == 1012
        assert await server.ends() == 0
        assert server.stderr.count("Traceback") == 0


async def test_a_drain_over_tls_ends_though_a_client_never_reads(tmp_path: Path, files: tuple[str, str]):
    async with serving(tmp_path, files, "--drain-timeout", "0") as server, slow(server.url, files) as client:
        await client.send(type="generate", id="g", prompt="x" * 100, ignore_eos=True, max_tokens=60_000)
        await client.until("token")
        client.socket.transport.pause_reading()
        server.signal()
        async with asyncio.timeout(20):
            assert await server.ends() == 0
        client.socket.transport.abort()


async def test_on_sighup_the_certificate_is_read_anew_and_open_connections_go_on(tmp_path: Path, files: tuple[str, str]):
    used = tmp_path / "cert.pem", tmp_path / "key.pem"
    first, second = files, make(tmp_path / "other")

    def put(certificate: str, key: str) -> None:
        used[0].write_bytes(Path(certificate).read_bytes())
        used[1].write_bytes(Path(key).read_bytes())

    async def shown(server: Process, certificate: str) -> str:
        async with connect(server.url, ssl=trusting(certificate)) as socket:
            return serial(Client(socket))

    put(*first)
    async with (
        serving(tmp_path, (str(used[0]), str(used[1]))) as server,
        connect(server.url, ssl=trusting(first[0])) as socket,
    ):
        client = Client(socket)
        await client.send(type="generate", id="g", prompt="x" * 100, ignore_eos=True, max_tokens=20_000)
        await client.until("token")
        put(*second)
        assert await shown(server, first[0]) == serial(client)
        server.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "the certificate was read anew" in server.stderr)
        assert await shown(server, second[0]) != serial(client)
        # A half of the next pair is there, the other is not yet.
        put(first[0], second[1])
        server.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "the certificate stays as it was: --tls-cert, --tls-key" in server.stderr)
        assert await shown(server, second[0]) != serial(client)
        assert (await client.done("g"))["finish_reason"] == "length"


# Slow and silent peers.


@contextlib.asynccontextmanager
async def slow(url: str, files: tuple[str, str]) -> AsyncIterator[Client]:
    """Connect a client with little room for unread bytes."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        trust = trusting(files[0])
        async with connect(url, sock=sock, ssl=trust, server_hostname="127.0.0.1", max_size=None, compression=None) as ours:
            try:
                yield Client(ours)
            finally:
                ours.transport.resume_reading()


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_peer_takes_and_says_is_told_through_tls(loop: Callable[[], Any], files: tuple[str, str]):
    async def check() -> None:
        async with secured(files) as server, server.client(ssl=trusting(files[0])) as client:
            await client.settle()
            await eventually(lambda: traffic(server).outstanding == 0)
            before = traffic(server)
            await client.generate(prompt="hello")
            await eventually(lambda: traffic(server).outstanding == 0)
            assert traffic(server).received > before.received + len('{"type":"generate","prompt":"hello"}')
            assert traffic(server).acknowledged > before.acknowledged + 5 * len('{"type":"token"}')

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())


@pytest.mark.parametrize("loop", LOOPS)
def test_who_takes_nothing_over_tls_is_given_up_and_who_takes_something_is_not(
    loop: Callable[[], Any], files: tuple[str, str]
):
    async def check() -> None:
        context = server_context(*files)
        async with (
            scripted(tls=context, stall_timeout=0.5) as (server, model),
            server.client(ssl=trusting(files[0])) as other,
            slow(server.url, files) as client,
        ):
            await other.send(type="generate", id="other", prompt="left alone")
            await in_engine(server, 1)
            client.socket.transport.pause_reading()
            # More than lies in the TLS of both sides, and less than an outbox holds.
            await client.send(type="generate", id="stalled", prompt=WIDE * 50, ignore_eos=True)
            await in_engine(server, 2)
            model.step_gate.let(200)
            await eventually(lambda: model.frees("other") == 1)
            assert len(server.server._connections) == 2
            await eventually(lambda: bool(model.step_gate.let()) or model.frees("stalled") == 1)
            client.socket.transport.resume_reading()
            assert await closing_code(client) == 4413
            assert (await other.done("other"))["finish_reason"] == "stop"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_slow_reader_over_tls_gets_fewer_and_longer_frames_and_loses_nothing(
    loop: Callable[[], Any], files: tuple[str, str]
):
    async def check() -> None:
        context = server_context(*files)
        async with scripted(tls=context) as (server, model), slow(server.url, files) as client:
            client.socket.transport.pause_reading()
            await client.send(type="generate", id="g", prompt=WIDE * 50, ignore_eos=True, max_tokens=203)
            model.open()
            await model.freed_of("g")
            client.socket.transport.resume_reading()
            done = await client.until("done")
            assert client.checker.texts["g"] == WIDE * 200
            assert len(client.of("g", "token")) < 200
            assert done["usage"]["completion_tokens"] == 203

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())
