"""One request's parts on their way from the engine's post to whoever reads them: a mailbox that merges.

Lives on the event loop; knows nothing of the thread at the other end.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from LLM.engine.request import Delta, Finished, GenerationRequest, Part, Prefill, Queued, Started


class GenerationStream:
    """One request's parts, as they come; unread parts merge, so a slow reader holds five at most.

    Leaving the `async with` before Finished means that nobody is listening: the engine drops the request.
    """

    def __init__(
        self,
        request: GenerationRequest,
        enter: "Callable[[GenerationStream], None]",
        leave: "Callable[[GenerationStream], None]",
    ) -> None:
        self.request = request
        self._enter = enter
        self._leave = leave
        self._unread: deque[Part] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        # What came so far, for an end that the thread could not tell.
        self.started = False
        self.completion_tokens = 0

    async def __aenter__(self) -> Self:
        self._enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Part:
        while not self._unread:
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        part = self._unread.popleft()
        self._ended = isinstance(part, Finished)
        return part

    def put(self, part: Part) -> None:
        """Take the engine's next part. The newest joins the unread one before it, and never overtakes it."""
        if isinstance(part, Started):
            self.started = True
        elif isinstance(part, Delta):
            self.completion_tokens += part.n
        last = self._unread[-1] if self._unread else None
        if isinstance(last, Delta) and isinstance(part, Delta):
            self._unread[-1] = Delta(last.text + part.text, last.n + part.n, last.logprobs + part.logprobs)
        elif isinstance(part, Queued | Prefill) and type(last) is type(part):
            self._unread[-1] = part
        else:
            self._unread.append(part)
        self._arrived.set()
