"""What tests share: a server in this process on a free port, and a client that judges every frame it gets."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect

from handlers import dispatcher
from LLM.giving_way import giving_way
from LLM.listing import MODELS_ROOT
from LLM.model_service import ModelService
from tests.asked import Asked, Resumable
from tests.checker import Checker
from wsserver.__main__ import engine_settings, keeping, load_options
from wsserver.auth import Keys, digest
from wsserver.config import Config
from wsserver.server import Server

pytest_plugins = ("tests.stage", "tests.mosquitto")  # they build upon this file, so their fixtures cannot be in here

ECHO = "wsserver/echo"
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PATIENCE = 30.0  # seconds without a frame after which a test fails instead of hanging


class Asker:
    """A client as tests use it, whatever it speaks through: what it asked for, what it got, and the judge of both."""

    def __init__(self, checker: Checker) -> None:
        self.checker = checker
        self.frames: list[dict[str, Any]] = []

    async def send(self, **message: Any) -> None:
        """Send one message, given as its fields."""
        raise NotImplementedError

    async def receive(self) -> dict[str, Any]:
        """Give the next frame of any kind, once the checker has passed it."""
        raise NotImplementedError

    async def settle(self) -> dict[str, Any]:
        """Wait until the server has read everything sent so far; give the status report that says so."""
        await self.send(type="status")
        return await self.until("status")

    def of(self, id: str, *kinds: str) -> list[dict[str, Any]]:
        """Give the frames of an id received so far, all or those of some kinds."""
        return [frame for frame in self.frames if frame.get("id") == id and (not kinds or frame["type"] in kinds)]

    async def until(self, *kinds: str, id: str | None = None) -> dict[str, Any]:
        """Read on until a frame of one of the kinds (and of the id, if given) comes; give that one."""
        while True:
            frame = await self.receive()
            if frame["type"] in kinds and id in (None, frame.get("id")):
                return frame

    async def done(self, id: str) -> dict[str, Any]:
        """Give the `done` of an id, received already or still to come."""
        received = self.of(id, "done")
        return received[-1] if received else await self.until("done", id=id)

    async def generate(self, **fields: Any) -> dict[str, Any]:
        """Run one generation to its end; give its `done`, with the joined text of its token frames in "joined"."""
        await self.send(type="generate", **fields)
        done = await self.until("done", id=fields.get("id"))
        return {**done, "joined": self.checker.texts[done["id"]]}


class Client(Asker):
    """One client connection; every frame passes the checker."""

    def __init__(self, socket: ClientConnection, resumable: Resumable | None = None) -> None:
        self.socket = socket
        super().__init__(Checker(resumable))

    async def send(self, **message: Any) -> None:
        """Send one message, given as its fields."""
        await self.send_text(orjson.dumps(message).decode())

    async def send_text(self, text: str) -> None:
        """Send one text frame, whatever it holds."""
        with contextlib.suppress(orjson.JSONDecodeError):
            message = orjson.loads(text)
            self.checker.sent(message if isinstance(message, dict) else {})
        await self.socket.send(text)

    async def resume(self, before: "Client", id: str, **changes: Any) -> None:
        """Ask to take up what another client has begun, from where that one is; `changes` are fields to say otherwise."""
        asked = before.asked(id)
        token = next(token for (_, token), known in self.checker.resumable.items() if known.message is asked.message)
        await self.send(**{"type": "resume", "id": id, "resume_token": token, "after_seq": asked.next_seq, **changes})

    def asked(self, id: str) -> Asked:
        """Give what this client asked for under an id last, running or ended."""
        running = self.checker.open.get(id)
        return running[0] if running else [asked for asked in self.checker.ended if asked.message.get("id") == id][-1]

    async def aclose(self) -> None:
        """Close the connection as a client does that is done."""
        await self.socket.close()

    async def receive(self) -> dict[str, Any]:
        """Give the next frame of any kind."""
        async with asyncio.timeout(PATIENCE):
            frame = self.checker.received(await self.socket.recv(decode=True))
        self.frames.append(frame)
        return frame


class Running:
    """A server in this process, with everything a test may want to look at."""

    def __init__(self, server: Server, models: ModelService) -> None:
        self.server = server
        self.models = models
        self.url = f"{'wss' if server.tls else 'ws'}://127.0.0.1:{server.port}/ws"
        self.resumable: Resumable = {}  # by any client

    def client_of(self, name: str) -> "contextlib.AbstractAsyncContextManager[Client]":
        """Connect with the key of one of `keyed`."""
        return self.client(additional_headers={"Authorization": f"Bearer {name}"})

    @contextlib.asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        """Connect a client."""
        async with connect(self.url, compression=None, **options) as socket:
            yield Client(socket, self.resumable)


def keyed(*names: str) -> Keys:
    """Give keys that read like the names of their owners."""
    return Keys({name: digest(name) for name in names})


@contextlib.asynccontextmanager
async def running(
    model: str = ECHO,
    root: Path = MODELS_ROOT,
    dtype: str = "auto",
    keys: Keys | None = None,
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Serve in this process on a free port; settings are those of `Config`."""
    config = Config(port=0, model=model, dtype=dtype, **settings)
    options = load_options(config)
    models = ModelService(model, options, engine_settings(config), root, keeping(config))
    try:
        async with Server(config, dispatcher(models), lambda: models.problem, keys, tls, giving_way) as server:
            yield Running(server, models)
    finally:
        await models.close()


@pytest.fixture
async def echo() -> AsyncIterator[Running]:
    """A server with the echo model."""
    async with running() as server:
        yield server


@pytest.fixture
async def client(echo: Running) -> AsyncIterator[Client]:
    """A client of the echo server."""
    async with echo.client() as client:
        yield client


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """The default model's folder, put there by `make install`."""
    folder = MODELS_ROOT / DEFAULT_MODEL
    assert (folder / "config.json").exists(), "the default model is missing; run `make install`"
    return folder


def add_folder(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text("{}")


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let the event loop run until a condition holds; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for here has no event to tell of it
            await asyncio.sleep(0)


async def stopping(server: Running) -> None:
    """Wait until the server has read a cancel of something resumable."""
    await eventually(lambda: any(job.stopping for job in server.server.resumables))
