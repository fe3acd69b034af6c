"""`python -m tests.fuzz [FRAMES [SEED]]`: random and mutated messages through codec, session, handlers and the echo engine.

In this process and without sockets: connections whose link hands on what it is given. Beside them one client behaves, and
what it gets has to be exact. Nothing may raise, log an error, or say what the protocol does not know; memory has to stay.
"""

import asyncio
import contextlib
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
from websockets.asyncio.server import ServerConnection

from handlers import dispatcher
from LLM.engine.worker import EngineSettings
from LLM.model_service import ModelService
from tests.checker import Checker
from tests.conftest import ECHO, eventually
from wsserver.__main__ import load_options
from wsserver.config import Config
from wsserver.connection import Connection, Dispatch
from wsserver.limits import Owner
from wsserver.outbox import Outbox
from wsserver.protocol import CloseCode, Error, ServerMessage
from wsserver.resumables import Resumables
from wsserver.session import ServerState, Session

Draw = random.Random

FRAMES, SEED = 1_000_000, 1
LIFE = 700  # frames of a connection at most: some come to the end of what they may send at once
ROOM = 32 << 20  # bytes by which memory may grow after the first tenth
IDS = ("a", "b", "c", "auto-1", "é😀", "i" * 128, "\r\n\x1b[2J", "__class__")
# What a field may hold instead of what it should.
JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        20,
        21,
        2**31 - 1,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**30,
        0.0,
        -0.0,
        1e-320,
        1e308,
    ),
    *(
        "",
        " ",
        "\0",
        "x",
        "i" * 129,
        "x" * 257,
        "y" * 5000,
        "\ud800",
        "{{ 7 * 7 }}",
        "../../x",
        ".*",
        "cuda:0",
        "auto",
        "int8",
    ),
    *([], {}, [[]], [None], ["s"] * 17, [-1], [2**31], list(range(65)), {"": None}, {"1": 1}, {"1": 1000}, {"x": 1}),
    *([{"role": "user", "content": "x"}], [{"role": "wizard", "content": "x"}], [{"role": "user"}], [[{"role": "user"}]]),
)
FIELDS = (
    *("id", "type", "prompt", "messages", "stream", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids"),
    *(
        "logprobs",
        "ignore_eos",
        "resumable",
        "model",
        "dtype",
        "device",
        "quantization",
        "token",
        "resume_token",
        "after_seq",
    ),
)


def life(draw: Draw, frames: int) -> list[str]:
    """Give so many text frames, which one connection says; now and then nothing but nonsense."""
    if draw.random() < 0.1:
        return [anything("", draw) for _ in range(frames)]
    return [mutated(draw) for _ in range(frames)]


def valid(draw: Draw) -> dict[str, Any]:
    """Give a message as a client means it; the id and token of a resume are for `Fuzz` to fill in."""
    id = {"id": draw.choice(IDS)} if draw.random() < 0.8 else {}
    kind = draw.randrange(8)
    if kind < 2:
        options = {"max_tokens": draw.randint(1, 64), "logprobs": draw.randint(0, 3), "resumable": True, "stream": False}
        some = dict(draw.sample(sorted(options.items()), draw.randint(0, 4)))
        return {"type": "generate", **id, "prompt": "p" * draw.randint(1, 80), **some}
    if kind < 3:
        turns = [{"role": draw.choice(["system", "user", "assistant"]), "content": "c"} for _ in range(draw.randint(1, 4))]
        return {"type": "generate", **id, "messages": turns}
    if kind < 5:
        return {"type": "cancel", **id}
    if kind < 6:
        return {"type": "resume", "id": "<id>", "resume_token": "<token>", "after_seq": draw.randint(0, 5)}
    return {"type": "init", **id, "model": ECHO} if kind < 7 else {"type": "status"}


def mutated(draw: Draw) -> str:
    """Give a text frame: a valid message, one that was changed in some places, or anything."""
    message = valid(draw)
    for _ in range(draw.choice((0, 0, 1, 1, 1, 2, 5))):
        field = draw.choice(FIELDS if draw.random() < 0.5 else tuple(message) or FIELDS)
        if draw.random() < 0.15:
            message.pop(field, None)
        else:
            message[field] = draw.choice(JUNK)
    text = json.dumps(message, ensure_ascii=draw.random() < 0.8 or "\ud800" in str(message))
    for _ in range(draw.choice((0, 0, 0, 0, 1, 2))):
        text = draw.choice(DAMAGES)(text, draw)
    return text


def _nested(text: str, draw: Draw) -> str:
    depth = draw.choice((1, 62, 63, 64, 65, 1000, 1025, 100_000))
    opening, closing = draw.choice((("[", "]"), ('{"x":', "}")))
    return text.replace("}", f',"deep":{opening * depth}1{closing * depth}}}', 1)


def _garbled(text: str, draw: Draw) -> str:
    place = draw.randrange(len(text) + 1)
    return (
        text[:place]
        + draw.choice(['"', "\\", "{", "]", "\0", "\x7f", ",", "é", "😀", "\u2028", "1e999", "NaN"])
        + text[place:]
    )


def anything(text: str, draw: Draw) -> str:
    """Give characters at random."""
    return "".join(chr(draw.choice((draw.randrange(0x80), draw.randrange(0xE000, 0x10FFFF)))) for _ in range(20))


DAMAGES: tuple[Callable[[str, Draw], str], ...] = (
    _nested,
    _garbled,
    lambda text, draw: text[: draw.randrange(len(text) + 1)],
    lambda text, draw: text.replace("}", f',"{draw.choice(FIELDS)}":{json.dumps(draw.choice(JUNK))}}}', 1),  # a key twice
    lambda text, draw: text * 2,
    lambda text, draw: text.replace("1", draw.choice(["1" * 400, "1e400", "-0", "1.", "0x1", "1e-400"])),
    anything,
)


class Fuzzed(Connection):
    """A connection without a socket: what is said to it is given, and what it says goes through its outbox to `hear`."""

    def __init__(
        self, session: Session, resumables: Resumables, dispatch: Dispatch, hear: Callable[[ServerMessage, str], None]
    ) -> None:
        super().__init__(cast(ServerConnection, None), session, Outbox(), resumables, dispatch)
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


class Fuzz:
    """A server without sockets, one client that behaves, and all those that do not, one after the other."""

    def __init__(self, models: ModelService, config: Config) -> None:
        self.frames = 0
        self.answers = 0  # that the one who behaves was given
        self.told: Counter[str] = Counter()  # what the others were told, by type and code
        self.state = ServerState(time.monotonic(), config.max_active, config=config)
        self._models = models
        self._dispatch = dispatcher(models)
        self._resumables = Resumables(max_bytes=1 << 20)
        self._tokens = deque([("id", "token")], maxlen=20)  # with which something may be resumed
        self._checker = Checker()
        self._good = self._connect("good", lambda frame, text: cast(None, self._checker.received(text)))

    async def live(self, frames: list[str]) -> None:
        """Let a connection say all this, or as much as it may before it is closed."""
        bad = self._connect(f"bad {self.frames % 50}", self._heard)
        try:
            await self._abuse(bad, frames)
        finally:
            await bad.leave()
        if bad.closed_with:
            self.told[f"close {bad.closed_with.value}"] += 1

    async def _abuse(self, bad: Fuzzed, frames: list[str]) -> None:
        for text in frames:
            self.frames += 1
            self._tokens.rotate()
            id, token = self._tokens[0]
            bad.say(text.replace('"<id>"', json.dumps(id)).replace("<token>", token))
            if self.frames % 10 == 0:
                await asyncio.sleep(0)
                self._behave()
            if bad.closed_with:
                break

    async def finish(self) -> None:
        """See that nothing is left once the last answer has come."""
        await eventually(lambda: not self._checker.open_questions(), 60)
        self._behave()
        await self.close()
        await eventually(lambda: not any(entry["active"] or entry["queued"] for entry in self._models.status()), 60)
        await eventually(lambda: not any(account.used for account in self.state.accounts._accounts.values()))

    async def close(self) -> None:
        """End what still runs."""
        await self._good.leave()
        await self._resumables.close()

    def _connect(self, address: str, hear: Callable[[ServerMessage, str], None]) -> Fuzzed:
        session = Session(address, self.state, address=Owner("address", address))
        return Fuzzed(session, self._resumables, self._dispatch, hear)

    def _heard(self, frame: ServerMessage, text: str) -> None:
        told = json.loads(text)
        if told["type"] == "started" and "resume_token" in told:
            self._tokens.append((told["id"], told["resume_token"]))
        error = frame if isinstance(frame, Error) else getattr(frame, "error", None)
        self.told[error.code if error else told.get("finish_reason", told["type"])] += 1
        assert error is None or error.code != "internal", f"the server failed: {frame}"

    def _behave(self) -> None:
        """See that what was asked for came, if it has come, and ask for the next."""
        if self._checker.open_questions():
            return
        if self.answers:
            done, text = self._checker.dones.pop(), self._checker.texts.pop(f"good {self.answers}")
            assert (done["finish_reason"], text) == ("stop", f"answer {self.answers}, untouched"), done
        self._checker.ended.clear()
        self.answers += 1
        ask = {"type": "generate", "id": f"good {self.answers}", "prompt": f"answer {self.answers}, untouched"}
        self._checker.sent(ask)
        self._good.say(json.dumps(ask))


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
    config = Config(model=ECHO, max_tokens=64, tokens_per_minute=10**9)
    with tempfile.TemporaryDirectory() as nothing:
        models = ModelService(ECHO, load_options(config), EngineSettings(config.max_active), Path(nothing))
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


def resident() -> int:
    """Give this process's resident memory, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def main(frames: int = FRAMES, seed: int = SEED) -> int:
    """Fuzz with so many frames; tell how fast that went, and what memory it took."""
    draw, began, warm = Draw(seed), time.monotonic(), 0
    async with fuzzing() as fuzz:
        while fuzz.frames < frames:
            await fuzz.live(life(draw, draw.randint(1, LIFE)))
            if fuzz.frames < frames / 10:
                warm = resident()
        seconds, growth = time.monotonic() - began, resident() - warm
    print(f"{fuzz.frames} frames of seed {seed}, {fuzz.frames / seconds:.0f} a second, were answered with")
    print(", ".join(f"{count} {what}" for what, count in fuzz.told.most_common()))
    print(f"{fuzz.answers} answers beside them were exact; {warm / 2**20:.1f} MiB, and {growth / 2**20:+.1f} in the end")
    return growth > ROOM


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*map(int, sys.argv[1:]))))
