"""A client that a bad network befalls: it asks, cancels, loses its connection, comes back and resumes what can be resumed.

All it does is drawn from one generator of random numbers. Each connection has its judge, and they share what goes on over
several connections; what one connection cannot show, such as a second end of the same id, is looked at here.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.asked import Asked, Resumable
from tests.checker import Checker
from tests.test_contract import answer_to
from tests.torture.proxy import Link, Proxy

PATIENCE = 60.0  # seconds without a frame after which it fails instead of hanging
# Unless more bytes came meanwhile than those of pings: one byte at a time, a long frame takes long.
PINGS_ONLY = 1000
WORDS = ("a", "river", "old", "light", "žluťoučký", "🐎", "walks", "over", "under", "stone")
MOST_OPEN = 6


class Line:
    """One connection, read by a task; every frame passes the judge."""

    def __init__(
        self, socket: ClientConnection, link: Link, resumable: Resumable, heard: Callable[["Line", Any], None]
    ) -> None:
        self.link = link
        self.checker = Checker(resumable)
        self.frames = 0
        self.resumed: set[str] = set()
        self.wrong_tokens: Counter[str] = Counter()
        self._socket = socket
        self._heard = heard
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def through(cls, proxy: Proxy, resumable: Resumable, heard: Callable[["Line", Any], None]) -> "Line":
        """Connect; `heard` gets every frame once the judge has passed it."""
        socket = await connect(f"ws://127.0.0.1:{proxy.port}/ws", compression=None, ping_interval=None)
        return cls(socket, proxy.links[socket.local_address[1]], resumable, heard)

    @property
    def gone(self) -> bool:
        return self._reader.done()

    async def send(self, **message: Any) -> None:
        """Send a message, or lose it with the connection."""
        self.checker.sent(message)
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(json.dumps(message))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read on until a condition holds or the connection is gone."""
        while not (condition() or self.gone):
            self._news.clear()
            before = self.link.forwarded
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await self._news.wait()
            moves = self._news.is_set() or self.link.forwarded - before > PINGS_ONLY
            assert moves, f"no frame for {PATIENCE:.0f} s on {self.link}: {self.checker.open_questions()}"

    async def ended(self) -> None:
        """Wait for the connection's end, and let the judge's objection out if it had one."""
        await self._reader

    async def leave(self) -> None:
        """Hang up."""
        await self._socket.close()
        await self.ended()

    async def _read(self) -> None:
        try:
            async for data in self._socket:
                assert isinstance(data, str)
                frame = self.checker.received(data)
                self.frames += 1
                self._heard(self, frame)
                self._news.set()
        except ConnectionClosed:
            pass  # what it is here for
        finally:
            self._news.set()


class TorturedClient:
    """One client and all its connections."""

    def __init__(self, proxy: Proxy, name: str, draw: random.Random) -> None:
        self.dones: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}
        self.asked: dict[str, dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()  # of what it did, to see that a run did it
        self._proxy = proxy
        self._name = name
        self._draw = draw
        self._resumable: Resumable = {}
        self._line: Line

    async def run(self, actions: int) -> None:
        """Do so many things, then let all come to its end."""
        await self._connect()
        acts = {self._generate: 6, self._read: 6, self._cancel: 3, self._status: 2, self._break: 3, self._move: 1}
        for act in self._draw.choices(list(acts), list(acts.values()), k=actions):
            self.counts[act.__name__] += 1
            if self._line.gone:
                await self._come_back()
            await act()
        await self._finish()

    def check(self) -> None:
        """See that every id came to what it had to come to."""
        for (id, _), _asked in self._resumable.items():
            assert id in self.dones, f"could be resumed, and has no end: {self.asked[id]}"
        for id, message in self.asked.items():
            text, reason = answer_to(message)
            done = self.dones.get(id, {"finish_reason": "lost"})
            found = done.get("text", "") if message.get("stream") is False else self.texts[id]
            if done["finish_reason"] in ("cancelled", "lost"):
                assert text.startswith(found), f"not the beginning of what was asked for: {found!r}, {message}"
            else:
                told = f"{len(found)} of {len(text)} characters, {done}, asked for by {message}"
                assert (found, done["finish_reason"]) == (text, reason), told

    # What it does.

    async def _generate(self) -> None:
        if len(self._line.checker.open) >= MOST_OPEN:
            return await self._read()
        id = f"{self._name}-{len(self.asked)}"
        message = request(id, self._draw)
        self.asked[id], self.texts[id] = message, ""
        await self._line.send(type="generate", id=id, **message)

    async def _read(self) -> None:
        line = self._line
        enough = line.frames + self._draw.randint(1, 40)
        await line.until(lambda: line.frames >= enough or not line.checker.open_questions())

    async def _cancel(self) -> None:
        if not self.asked:
            return
        whose = {"id": self._draw.choice(list(self.asked)[-4:])} if self._draw.random() < 0.9 else {}
        await self._line.send(type="cancel", **whose)
        if self._draw.random() < 0.5:
            await self._status()  # its answer says that the cancel was read

    async def _status(self) -> None:
        await self._line.send(type="status")

    async def _break(self) -> None:
        link, draw = self._line.link, self._draw
        fault: Callable[[], Awaitable[None] | None] = draw.choice(
            [
                link.cut,
                link.reset,
                link.half_open,
                lambda: self._freeze(link, draw.uniform(0, 0.6)),
                lambda: link.delay(draw.uniform(0, 0.02)),
                link.dribble,
                lambda: calm(link),
            ]
        )
        happening = fault()
        if happening is not None:
            await happening

    async def _move(self) -> None:
        """Resume elsewhere what runs here."""
        old = self._line
        await self._connect()
        await self._resume_all()
        await old.until(lambda: not any(asked.message.get("resumable") for asked in self._started(old)))
        await old.leave()
        self._forget(old)
        await self._resume_all()  # what began there since, and was not to be moved in time

    def _freeze(self, link: Link, seconds: float) -> None:
        link.freeze()
        asyncio.get_running_loop().call_later(seconds, link.thaw)

    # How it loses and finds its connection.

    async def _connect(self) -> None:
        self._line = await Line.through(self._proxy, self._resumable, self._heard)

    async def _come_back(self) -> None:
        old = self._line
        await old.ended()
        self._forget(old)
        await self._connect()
        await self._resume_all()

    def _lost(self) -> list[tuple[str, str, Asked]]:
        """Give what can be resumed and has not been asked for here."""
        known = self.dones.keys() | self._line.resumed
        return [(id, token, asked) for (id, token), asked in self._resumable.items() if id not in known]

    async def _resume_all(self) -> None:
        for id, token, asked in self._lost():
            self._line.resumed.add(id)
            self.counts["resumes"] += 1
            seq = self._draw.choice(list(asked.seen.borders)) if self._draw.random() < 0.3 else asked.next_seq
            if self._draw.random() < 0.1:
                await self._line.send(type="resume", id=id, resume_token=token, after_seq=asked.next_seq + 100_000)
            if self._draw.random() < 0.1:
                self._line.wrong_tokens[id] += 1
                await self._line.send(type="resume", id=id, resume_token="x" + token, after_seq=seq)
            await self._line.send(type="resume", id=id, resume_token=token, after_seq=seq)

    def _started(self, line: Line) -> list[Asked]:
        asked = [first for first, *_ in line.checker.open.values()]
        return [first for first in asked if first.last not in ("nothing", "queued")]

    def _forget(self, old: Line) -> None:
        """Keep what a connection that is gone had said of ids that end with it."""
        for id, (asked, *_) in old.checker.open.items():
            if id not in self.dones:  # on another connection meanwhile
                self.texts[id] = asked.text

    def _heard(self, line: Line, frame: dict[str, Any]) -> None:
        id = frame.get("id", "")
        self.counts["merged"] += len(frame.get("text", "")) > 1  # a step makes one letter
        if frame["type"] == "done":
            # Whoever resumes after the end is told it again.
            earlier = self.dones.setdefault(id, frame)
            assert frame["finish_reason"] == earlier["finish_reason"], f"two ends: {earlier} and {frame}"
            self.texts[id] = line.checker.texts[id]
            self.counts[frame["finish_reason"]] += 1
        elif frame["type"] == "detached":
            # A resume sent on an older connection may be read after the one sent here: then it is for this one to ask again.
            line.resumed.discard(id)
        elif frame["type"] == "error" and frame["code"] == "resume_expired":
            assert line.wrong_tokens[id], f"expired, but it cannot have: {frame}"
            line.wrong_tokens[id] -= 1

    async def _finish(self) -> None:
        while True:
            if self._line.gone:
                await self._come_back()
            line = self._line
            calm(line.link)
            await self._resume_all()
            await line.until(lambda line=line: not line.checker.open_questions())
            await line.send(type="status")
            await line.until(lambda line=line: not line.checker.open_questions())
            if not line.gone and not self._lost():
                break
        line.checker.quiet()
        await line.leave()


def request(id: str, draw: random.Random) -> dict[str, Any]:
    """Make a message whose answer is known, and is nobody else's."""
    kind = draw.choice(["words", "words", "long prompt", "long answer", "long answer"])
    message: dict[str, Any] = {"prompt": f"{id}: {' '.join(draw.choices(WORDS, k=draw.randint(0, 30)))}", "temperature": 0}
    # A token is a byte, so what ends somewhere in its text has no letters of two.
    if kind == "long prompt":
        message |= {"prompt": f"{id}: {'chunk ' * draw.randint(50, 200)}", "max_tokens": draw.randint(1, 60)}
    elif kind == "long answer":
        message |= {"prompt": f"{id}: again, ", "ignore_eos": True, "max_tokens": draw.randint(100, 600)}
    if draw.random() < 0.2:
        message["stream"] = False
    elif draw.random() < 0.2:
        message["logprobs"] = draw.randint(0, 1)
    if draw.random() < 0.7:
        message["resumable"] = True
    return message


def calm(link: Link) -> None:
    """End what may be going on with a link that is still there."""
    link.thaw()
    link.delay(0)
    link.dribble(on=False)
