"""One open id at work: the task that serves it, what would stop it, and who listens to what it says.

A job belongs to the connection that asked for it, but for a generation that is resumable and has begun: that one outlives
its connection and may be taken up by another, so it keeps a transcript of what it said. Knows no sockets and no models.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from wsserver.limits import Account, Bill, Owner
from wsserver.protocol import (
    Done,
    Error,
    ErrorCode,
    ErrorDetail,
    FinishReason,
    Generate,
    Init,
    Ready,
    ServerMessage,
    Started,
    Timings,
    Token,
    Usage,
)
from wsserver.session import StopReason, stopped
from wsserver.transcript import Transcript

log = logging.getLogger(__name__)


class Listener(Protocol):
    """To whom a job speaks."""

    def send(self, frame: ServerMessage) -> None:
        """Take a frame about an id that is open there."""
        ...

    def lose(self, job: "Job") -> None:
        """Be told that somebody else will listen to a job instead."""
        ...


class Keeper(Protocol):
    """Who keeps resumable jobs for those who may come back for them."""

    max_unheard_tokens: int

    def keep(self, job: "Job") -> str:
        """Keep a job from now on; give the token that finds it."""
        ...

    def grew(self, job: "Job", by: int) -> None:
        """Be told that a kept job's transcript takes so many bytes more."""
        ...

    def moved(self, job: "Job") -> None:
        """Be told that a kept job has another listener."""
        ...

    def let_go(self, job: "Job") -> None:
        """Be told that nobody listens to a kept job, or that it has ended: its time runs from now."""
        ...


class Job:
    """What serves one id."""

    def __init__(
        self,
        id: str,
        number: int,
        message: Init | Generate,
        listener: Listener,
        keeper: Keeper,
        account: Account,
        owner: Owner,
    ) -> None:
        self.id = id
        # Which one of its client's it is. The id does not tell: it is free again there once the job was taken up elsewhere.
        self.number = number
        self.owner = owner  # its key is needed to take it up again
        self.ended = False
        self.task: asyncio.Task[None]
        # What was said, where somebody may want it again, or where it is to be told in the end alone.
        streams = not isinstance(message, Generate) or message.stream is not False
        resumable = isinstance(message, Generate) and bool(message.resumable)
        self.transcript = Transcript(id, streams) if resumable or not streams else None
        # Whether it outlives its connection: from when its token is told until it is forgotten.
        self.kept = False
        self._generates = isinstance(message, Generate)
        self._bill = Bill(account)
        self._done: Done | None = None
        self._streams = streams
        self._resumable = resumable
        self._keeper = keeper
        self._listener: Listener | None = listener
        self._live = True  # whether its listener hears it as it speaks, or still what it said before
        self._unheard = 0  # tokens since nobody listens
        self._overrun = False  # whether those were too many
        self._stop: Callable[[], object] | None = None
        self._stop_reason: StopReason | None = None
        self._stopped_at = 0.0
        self._usage = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)

    def start(self, serve: "Callable[[Job], Coroutine[None, None, None]]") -> None:
        """Serve it in a task of its own."""
        self.task = asyncio.create_task(self._run(serve))
        self.task.add_done_callback(self._settle)  # which runs even if the task is cancelled before it began

    # For message handlers.

    def send(self, frame: ServerMessage) -> None:
        """Say something about this id."""
        if isinstance(frame, Token):
            self._count(frame)
            if not self._streams:
                return
        ends = isinstance(frame, Done | Ready | Error)
        if self._stop_reason == "cancelled" and not ends:
            return  # also where somebody listens who never said cancel: it was read on another connection
        if isinstance(frame, Started):
            frame = self._begin(frame)
        elif isinstance(frame, Done):
            frame = self._end(frame)
        self.ended = ends
        if ends:
            self._settle()
        if self._listener and self._live:
            self._listener.send(frame)
        if self.ended and self.kept:
            self._keeper.let_go(self)

    def read(self, tokens: int) -> None:
        """Say that its prompt was read, or so much of it, which costs so many tokens."""
        self._bill.charge(tokens, time.monotonic())

    def on_stop(self, stop: Callable[[], object]) -> None:
        """Say what would stop it from now on; called at once if it has been told to stop already."""
        self._stop = stop
        if self.stopping:
            stop()

    @property
    def stopping(self) -> bool:
        """Whether it has been told to stop."""
        return self._stop_reason is not None or self._overrun

    def unfinished(
        self,
        reason: FinishReason,
        total_ms: float,
        error: tuple[ErrorCode, str] | None = None,
        retry_after: float | None = None,
    ) -> ServerMessage:
        """Give the frame that ends it for a reason of the server's own; `retry_after` is in seconds."""
        code, message = error or (None, "")
        retry_after_ms = None if retry_after is None else round(retry_after * 1000)
        if code and not self._generates:
            return Error(code=code, message=message, id=self.id, retry_after_ms=retry_after_ms)
        detail = ErrorDetail(code=code, message=message, retry_after_ms=retry_after_ms) if code else None
        return Done(id=self.id, finish_reason=reason, usage=self._usage, timings=Timings(total_ms=total_ms), error=detail)

    # For the peers that listen.

    def stop(self, reason: StopReason, now: float) -> None:
        """Stop it; the frame that ends it follows."""
        if reason == "cancelled" and self.transcript:
            if self._streams:
                self._grow(self.transcript.drop_tokens)
            if self.transcript.done:  # its end was on its way in a replay; whoever resumes it next is told no other one
                self.transcript.done = stopped(self.transcript.done, reason, 0.0)
        if self.ended or self._stop_reason:
            return
        self._stop_reason, self._stopped_at = reason, now
        if self._stop:
            self._stop()

    def listen(self, listener: Listener | None, live: bool = True) -> None:
        """Let somebody else, or nobody, hear what it says from now on; one who is not `live` reads the transcript first."""
        self._listener, self._live, self._unheard = listener, live, 0
        if self.kept:
            (self._keeper.let_go if listener is None else self._keeper.moved)(self)

    @property
    def listener(self) -> Listener | None:
        """Who listens."""
        return self._listener

    @property
    def needs_transcript(self) -> bool:
        """Whether somebody reads it just now."""
        return self._listener is not None and not self._live

    @property
    def size(self) -> int:
        """The bytes of its transcript."""
        return self.transcript.size if self.transcript else 0

    def reaches(self, seq: int) -> bool:
        """Whether a listener may begin at `seq`; asked of a kept job only."""
        return self.transcript is not None and self.transcript.reaches(seq)

    def after(self, seq: int, max_bytes: int) -> Token | Done | None:
        """Give the frame that follows `seq`, of some `max_bytes`; None if it is still to come."""
        return self.transcript.after(seq, max_bytes) if self.transcript else self._done

    @property
    def tokens(self) -> int:
        """The `seq` behind all tokens so far; only its end follows there once it has ended."""
        return self.transcript.tokens if self.transcript else 0

    @property
    def key(self) -> str | None:
        """The name of the key with which it was asked for."""
        return self.owner.name if self.owner.kind == "key" else None

    def forget(self) -> None:
        """Be kept no longer: it ends with its connection again, and at once if nobody listens."""
        self.kept = False
        if self._streams:
            self.transcript = None
        if self._listener is None:
            self.task.cancel()

    # What is said.

    def _begin(self, frame: Started) -> Started:
        self._usage.prompt_tokens, self._usage.cached_tokens = frame.prompt_tokens, frame.cached_tokens
        self._bill.start()
        self._charge(self._usage)
        if not self._resumable or self._listener is None:  # who left before it began cannot come back for it
            return frame
        self.kept = True
        return replace(frame, resume_token=self._keeper.keep(self))

    def _count(self, frame: Token) -> None:
        self._usage.completion_tokens += frame.n
        self._charge(self._usage)
        if self.transcript and not (self._streams and self._stop_reason == "cancelled"):
            self._grow(partial(self.transcript.add, frame))
        if self._listener is None and not self.stopping:
            self._unheard += frame.n
            self._overrun = self._unheard > self._keeper.max_unheard_tokens
            if self._overrun and self._stop:
                self._stop()

    def _grow(self, change: Callable[[], None]) -> None:
        assert self.transcript, "there is something that changes"
        size = self.transcript.size
        change()
        if self.kept:
            self._keeper.grew(self, self.transcript.size - size)

    def _charge(self, usage: Usage) -> None:
        self._bill.charge(usage.prompt_tokens + usage.completion_tokens, time.monotonic())

    def _settle(self, _: object = None) -> None:
        self._bill.settle()

    def _end(self, frame: Done) -> Done:
        self._charge(frame.usage)
        if self._stop_reason:
            frame = stopped(frame, self._stop_reason, time.monotonic() - self._stopped_at)
        elif self._overrun and frame.finish_reason == "cancelled":
            frame = replace(frame, finish_reason="length")  # it reached the bound of what may be made for nobody
        self._done = self.transcript.end(frame) if self.transcript else frame
        return self._done

    async def _run(self, serve: "Callable[[Job], Coroutine[None, None, None]]") -> None:
        try:
            await serve(self)
        except asyncio.CancelledError:
            return  # a task that ends as cancelled keeps this error, whose frames know the job that knows the task
        except BaseException:  # a panic in Rust code, of the tokenizer or of JSON, is no Exception
            log.exception("serving a request failed")
        finally:
            self._stop = None
        if not self.ended:
            # Only after the exception logged above: every open id gets its one end, whatever happened.
            error: tuple[ErrorCode, str] = ("internal", "the server failed to serve this request; its log says why")
            self.send(self.unfinished("error", 0.0, error))
