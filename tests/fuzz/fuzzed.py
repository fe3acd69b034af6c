"""A server without sockets to be fuzzed: connections whose link hands on what it is given, and one client that behaves.

What the one who behaves gets has to be exact all the while. Nothing may raise, log an error or be answered by what the
protocol does not know, and nothing may be left when all have gone.
"""

import asyncio
import contextlib
import json
import logging
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import msgspec

from handlers import dispatcher
from LLM._base_model_handler import LoadedModel, LoadOptions, Progress
from LLM.listing import Listed
from LLM.model_service import ModelService
from LLM.model_srv_wsserver_echo import ModelHandler
from tests.checker import Checker
from tests.conftest import ECHO, eventually
from tests.fuzz.messages import KEY, RESUME_TOKEN, RESUMED_ID
from wsserver.__main__ import engine_settings, load_options
from wsserver.accepted import Accepted
from wsserver.config import Config
from wsserver.connection import Connection, Dispatch
from wsserver.limits import Owner
from wsserver.outbox import Outbox
from wsserver.protocol import CloseCode, Error, ServerMessage
from wsserver.resumables import Resumables
from wsserver.session import ServerState, Session

CLIENTS = 50  # whose connections follow each other
STRANGERS = 10  # one connection in so many comes without a key
PACES = (2, 8, 32)  # frames that a connection says at once, in turn
PATIENT = 4  # one connection in so many hears its answers out before it says more
BLOCKS = 256  # of the KV cache
TEXTS = 1000  # that the one who behaves says, one after the other: a tokenizer keeps each word it has met
PATIENCE = 60.0  # seconds for what was asked for to come to its end

Hear = Callable[[ServerMessage, str], None]


class Fuzzed(Connection):
    """A connection without a socket: what is said to it is given, and what it says goes through its outbox to `hear`."""

    def __init__(self, session: Session, resumables: Resumables, dispatch: Dispatch, hear: Hear) -> None:
        def whose(key: str) -> str | None:
            return session.id if key == KEY else None

        super().__init__(cast(Accepted, None), session, Outbox(), resumables, dispatch, whose)
        self.closed_with: CloseCode | None = None
        self._hear = hear

    def say(self, text: str) -> None:
        """Let the client say a text frame."""
        self._receive(text)

    def push(self, frame: ServerMessage) -> None:
        self._outbox.push(frame)
        while (data := self._outbox.pop()) is not None:
            self._hear(msgspec.json.decode(data, type=ServerMessage), data.decode())

    def close(self, code: CloseCode, reason: str) -> None:
        self.closed_with = self.closed_with or code

    async def leave(self) -> None:
        """Hang up, and wait for what ends with that."""
        self.peer.leave()
        await self.peer.left()


class SmallEcho(ModelHandler):
    """The echo model with a KV cache that is soon full, so that memory soon stands still."""

    def load(self, folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
        loaded = super().load(folder, options, progress)
        loaded.runner.block_count = BLOCKS
        return loaded


class Fuzz:
    """A server, one client that behaves, and all those that do not, one after the other."""

    def __init__(self, models: ModelService, config: Config) -> None:
        self.frames = 0
        self.answers = 0  # that the one who behaves was given
        self.told: Counter[str] = Counter()  # what the others were told, by type, code or reason
        self.state = ServerState(time.monotonic(), config.max_active, config=config, needs_key=True)
        self._models = models
        self._dispatch = dispatcher(models)
        self._resumables = Resumables(max_bytes=1 << 20)
        self._resumable = deque([("id", "token")], maxlen=20)  # ids and tokens that some had
        self._lives = 0
        self._checker = Checker()
        self._objections: list[AssertionError] = []  # to what somebody was told
        self._good = self._connect("good", "good", self._heard_well)

    async def live(self, frames: list[str]) -> None:
        """Let a connection say all this, or as much as it may before it is closed."""
        self._lives += 1
        name = f"bad {self._lives % CLIENTS}"
        bad = self._connect(name, name if self._lives % STRANGERS else None, self._heard)
        try:
            await self._abuse(bad, frames)
        finally:
            await bad.leave()
        if bad.closed_with:
            self.told[f"close {bad.closed_with.value}"] += 1

    async def finish(self) -> None:
        """See that nothing is left once the last answer has come."""
        await eventually(lambda: bool(self._objections) or not self._checker.open_questions(), PATIENCE)
        self._behave()
        await self.close()
        await eventually(lambda: not any(entry["active"] or entry["queued"] for entry in self._models.status()), PATIENCE)
        await eventually(lambda: not any(account.used for account in self.state.accounts._accounts.values()), PATIENCE)
        assert not len(self._resumables)

    async def close(self) -> None:
        """End what still runs."""
        await self._good.leave()
        await self._resumables.close()

    async def _abuse(self, bad: Fuzzed, frames: list[str]) -> None:
        pace = PACES[self._lives % len(PACES)]
        for number, text in enumerate(frames):
            self.frames += 1
            # The newest one is this client's own, if it has any.
            id, token = self._resumable[-1 if number % 2 else self.frames % len(self._resumable)]
            bad.say(text.replace(json.dumps(RESUMED_ID), json.dumps(id)).replace(RESUME_TOKEN, token))
            if number % pace == 0:
                await asyncio.sleep(0)
                if self._lives % PATIENT == 0:
                    await eventually(lambda: bool(bad.closed_with) or not bad.peer.session.active, PATIENCE)
                self._behave()
            if bad.closed_with:
                break

    def _connect(self, name: str, key: str | None, hear: Hear) -> Fuzzed:
        def judged(frame: ServerMessage, text: str) -> None:
            try:
                hear(frame, text)
            except AssertionError as objection:
                # A job logs what it does not expect, and goes on to its end.
                self._objections.append(objection)
                raise

        session = Session(name, self.state, key=key, address=Owner("address", name))
        return Fuzzed(session, self._resumables, self._dispatch, judged)

    def _heard(self, frame: ServerMessage, text: str) -> None:
        told = json.loads(text)
        if told["type"] == "started" and "resume_token" in told:
            self._resumable.append((told["id"], told["resume_token"]))
        error = frame if isinstance(frame, Error) else getattr(frame, "error", None)
        self.told[error.code if error else told.get("finish_reason", told["type"])] += 1
        assert error is None or error.code != "internal", f"the server failed: {frame}"

    def _heard_well(self, frame: ServerMessage, text: str) -> None:
        self._checker.received(text)

    def _behave(self) -> None:
        """See that nothing was wrong so far, and that what was asked for came, if it has come; and ask for the next."""
        if self._objections:
            raise self._objections[0]
        if self._checker.open_questions():
            return
        if self.answers:
            done, text = self._checker.dones[-1], self._checker.texts[f"good {self.answers}"]
            assert (done["finish_reason"], text) == ("stop", _prompt(self.answers)), done
        for seen in (self._checker.dones, self._checker.texts, self._checker.scored, self._checker.ended):
            seen.clear()  # type: ignore[attr-defined]
        self.answers += 1
        ask = {"type": "generate", "id": f"good {self.answers}", "prompt": _prompt(self.answers)}
        self._checker.sent(ask)
        self._good.say(json.dumps(ask))


def _prompt(number: int) -> str:
    return f"answer {number % TEXTS}, untouched"


class Errors(logging.Handler):
    """Keeps what is logged as an error: a bug, whatever a client has said."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))


@contextlib.asynccontextmanager
async def fuzzing() -> AsyncIterator[Fuzz]:
    """Give a server to be fuzzed; fails if it logged an error, or a task raised."""
    errors, loop = Errors(), asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.records.append(str(context)))
    logging.getLogger().addHandler(errors)
    # What one client may say in a time is left as it is, and many are told that it was too much.
    config = Config(model=ECHO, max_tokens=64, tokens_per_minute=10**9)
    with tempfile.TemporaryDirectory() as nothing:
        models = ModelService(ECHO, load_options(config), engine_settings(config), Path(nothing))
        models.listing[ECHO] = Listed(ECHO, SmallEcho, Path())
        try:
            fuzz = Fuzz(models, config)
            try:
                yield fuzz
                await fuzz.finish()
            finally:
                await fuzz.close()
        finally:
            await models.close()
            logging.getLogger().removeHandler(errors)
    assert not errors.records, "\n".join(errors.records[:3])
