"""A server as its client sees it, and the answers that it gives: any number at once, on one connection.

When that is lost it comes back by itself, and they go on where they were. Knows no models.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

from wsserver.client.asked import Generation, Load
from wsserver.client.connection import LastingConnection, State
from wsserver.client.dialing import URL, Dialer
from wsserver.client.messages import Done, Parameters, Progress
from wsserver.protocol import Ready, StatusReport, TokenLogprob


def _ignore(_: object) -> None:
    """Take what nobody asked to be told."""


def connect(
    url: str = URL, key: str | None = None, *, on_state: Callable[[State], object] = _ignore, patience: float = 120.0
) -> "Client":
    """Give a client, an async context manager that is connected inside.

    A lost connection is tried anew, for `patience` seconds; `on_state` is told how it stands. `key` is for a server that
    asks for one.
    """
    return Client(LastingConnection(Dialer(url, key, patience), on_state))


class Client:
    """A server, as its client sees it.

    Whatever is asked of it, entering it included, raises a `ServerError` if the server refuses it, and an `OSError` if there
    is no connection: a `ConnectionLost`, once there was one.
    """

    def __init__(self, connection: LastingConnection) -> None:
        self._connection = connection
        self._serials = itertools.count(1)

    async def __aenter__(self) -> Self:
        await self._connection.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._connection.close()

    @property
    def state(self) -> State:
        """How the connection stands."""
        return self._connection.state

    def generate(
        self,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        prompt: str | None = None,
        resumable: bool = True,
        on_progress: Callable[[Progress], object] = _ignore,
        **parameters: Unpack[Parameters],
    ) -> "Answer":
        """Give the answer to a conversation or a prompt. Asked for as soon as it is iterated, entered or its text awaited.

        `on_progress` is told its place in line, its start and how much of a long prompt is done.
        """
        generation = Generation(f"g{next(self._serials)}", messages, prompt, resumable, parameters)
        return Answer(generation, self._connection, on_progress)

    async def init(
        self,
        model: str | None = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        quantization: str | None = None,
        on_progress: Callable[[Progress], object] = _ignore,
    ) -> Ready:
        """Choose the model of all that is asked for from now on, the server's default if none is named; wait for its load.

        `on_progress` is told how the load goes. One that nobody waits for any more is cancelled.

        Raises:
            ServerError: it cannot be loaded, or was cancelled; the model is the one that it was.
        """
        load = Load(f"load{next(self._serials)}", model=model, dtype=dtype, device=device, quantization=quantization)
        self._connection.ask(load)
        try:
            while load.progress or not load.ended:
                await self._connection.news(load)
                while load.progress:
                    on_progress(load.progress.popleft())
        finally:
            self._connection.cancel(load)
        return load.outcome()

    async def status(self) -> StatusReport:
        """Ask what the server is doing."""
        return await self._connection.status()

    def cancel(self) -> None:
        """Stop every answer and load; each of them then ends."""
        self._connection.cancel_all()


class Answer:
    """One answer, in pieces as they come: `async for token in answer`. Leaving that loop before its end cancels the answer.

    That happens at once and waits for nothing. It hangs on CPython, which frees the iterator of a loop that is left at once;
    `async with` around the loop cancels in any case. `cancel()` is for a loop that goes on to the end, and to `done`.
    """

    def __init__(
        self, generation: Generation, connection: LastingConnection, on_progress: Callable[[Progress], object]
    ) -> None:
        self._generation = generation
        self._connection = connection
        self._on_progress = on_progress
        self._begun = False

    def __aiter__(self) -> "_Loop":
        self._begin()
        return _Loop(self, self._connection.loop)

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    async def text(self) -> str:
        """Wait for the end; give the whole text, or as much as there was of an answer that was cut off.

        Raises:
            ServerError: it could not be made, or not finished.
            ConnectionLost: it was lost with its connection.
        """
        async with self:
            return "".join([piece async for piece in self])

    def cancel(self) -> None:
        """Stop it: its end comes within one step of the model, and says `cancelled`."""
        self._connection.cancel(self._generation)

    @property
    def done(self) -> Done:
        """How it ended.

        Raises:
            asyncio.InvalidStateError: it has not ended.
            ConnectionLost: it was lost with its connection.
        """
        if self._generation.done:
            return self._generation.done
        raise self._generation.error or asyncio.InvalidStateError("the answer has not ended yet")

    @property
    def tokens(self) -> int:
        """How many tokens have come."""
        return self._generation.tokens

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The log probabilities of the tokens that have come, if they were asked for."""
        return self._generation.logprobs

    def _begin(self) -> None:
        if not self._begun:
            self._connection.ask(self._generation)
            self._begun = True

    async def _next(self) -> str | None:
        """Give the text that has come since the last time, once there is some; None at the end."""
        generation = self._generation
        while True:
            while generation.progress:
                self._on_progress(generation.progress.popleft())
            if text := generation.take():
                return text
            if generation.error:
                raise generation.error.with_traceback(None)  # others may raise it too
            if generation.ended:
                return None
            await self._connection.news(generation)


class _Loop:
    """What one `async for` holds. When the loop is left it is freed, and nobody wants the rest."""

    def __init__(self, answer: Answer, loop: asyncio.AbstractEventLoop) -> None:
        self._answer = answer
        self._loop = loop

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        text = await self._answer._next()
        if text is None:
            raise StopAsyncIteration
        return text

    def __del__(self) -> None:
        # Whatever thread frees it.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._answer.cancel)
