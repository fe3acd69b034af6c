"""What may be said next on one connection: the ids that are open, and the frames that may still follow for each.

Pure: no sockets, timers, tasks or engine; whoever calls brings the time. Two gates: what a client says passes `open` and
`cancel`, what the server says passes `admit`, so every rule of protocol.md about order stands in this file.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from wsserver.auth import TooManyGuesses
from wsserver.config import Config
from wsserver.limits import Account, Accounts, Owner, TokenBucket, address_of, bucket, weight
from wsserver.protocol import (
    Cancel,
    ClientMessage,
    ConnectionInfo,
    Detached,
    Done,
    Error,
    ErrorDetail,
    Generate,
    Init,
    Loading,
    Prefill,
    Queued,
    Ready,
    Refusal,
    Resume,
    Resumed,
    ServerMessage,
    Started,
    Timings,
    Token,
    Usage,
    head,
)


class Phase(enum.Enum):
    """How far one id has come. An id without a phase is not open: never seen, or ended."""

    LOADING = "an init was read"
    ACCEPTED = "a generate was read"
    RESUMING = "a resume was read"
    STARTED = "its prefill began"
    STREAMING = "its first token was sent"


# What the server may say of an id, and what the id is afterwards; None is the end.
TRANSITIONS: dict[tuple[Phase, type[ServerMessage]], Phase | None] = {
    (Phase.LOADING, Loading): Phase.LOADING,
    (Phase.LOADING, Ready): None,
    (Phase.LOADING, Error): None,
    (Phase.ACCEPTED, Queued): Phase.ACCEPTED,
    (Phase.ACCEPTED, Started): Phase.STARTED,
    (Phase.ACCEPTED, Done): None,
    (Phase.RESUMING, Resumed): Phase.STARTED,
    (Phase.STARTED, Prefill): Phase.STARTED,
    (Phase.STARTED, Token): Phase.STREAMING,
    (Phase.STARTED, Detached): None,
    (Phase.STARTED, Done): None,
    (Phase.STREAMING, Token): Phase.STREAMING,
    (Phase.STREAMING, Detached): None,
    (Phase.STREAMING, Done): None,
}

# How far an id has come that a message has just opened.
OPENING = {Init: Phase.LOADING, Generate: Phase.ACCEPTED, Resume: Phase.RESUMING}

KEY_FIRST = "this server asks for a key; send init with a token, or show the key when you connect"
WRONG_KEY = "$.token: this key is wrong; ask the operator for one"
TOO_MANY_GUESSES = "$.token: too many wrong keys came from this address; try again in a minute"
TOO_FAST = "this connection, or all of this client's, have sent too many messages in too short a time; send fewer"
TOO_MANY_TOKENS = "this client has had too many tokens in the last minute, those of its prompts included"
SHUTTING_DOWN = "this server is stopping; connect again in a moment"

StopReason = Literal["cancelled", "shutdown"]


class IllegalFrame(Exception):
    """The server itself broke the protocol: a bug, never a client's doing."""


class TooManyBadMessages(Exception):
    """The client sends nothing but nonsense; its connection is to be closed with 4400."""


class WrongKey(Refusal):
    """The client has shown a wrong key; after the answer its connection is to be closed with 4401."""


class TooManyWrongKeys(WrongKey):
    """Too many wrong keys came from the client's address; after the answer its connection is to be closed with 4429."""


class TooManyMessages(Exception):
    """The client does not slow down though it was told to; its connection is to be closed with 4429."""


@dataclass(slots=True)
class _Open:
    phase: Phase
    message: Init | Generate | Resume
    stop: StopReason | None = None
    stopped_at: float = 0.0
    position: int | None = None  # the place in line that the client was told last


@dataclass(slots=True)
class ServerState:
    """What all sessions of a server share."""

    started_at: float
    max_active: int
    request_timeout: float = 600.0  # seconds from reading a generate to its end
    draining: bool = False
    needs_key: bool = False
    auth_timeout: float = 10.0  # seconds in which a client that needs a key has to show it
    config: Config = field(default_factory=Config)
    accounts: Accounts = field(init=False)

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.config)


@dataclass(slots=True)
class Session:
    """One connection's ids."""

    id: str
    server: ServerState
    key: str | None = None  # the name of the client's key
    max_open: int = 256
    max_bad_messages: int = 32
    address: Owner = field(default_factory=lambda: address_of(None))
    user: str | None = None  # for whom all requests of this connection are that name nobody
    # The inits, oldest first, that may yet say which model the next generate uses: the last one that led to a loaded model
    # (the first of all asks for the server's default), and those read after it that have not failed.
    _inits: list[Init] = field(default_factory=lambda: [Init()])
    _open: dict[str, _Open] = field(default_factory=dict)
    _assigned: int = 0
    _bad_messages: int = 0
    _fast_messages: int = 0
    _wait: float = 0.0  # seconds for which the message read last came too early
    _messages: TokenBucket = field(init=False)

    def __post_init__(self) -> None:
        self._messages = bucket(self.server.config.messages_per_second)

    # The client's side.

    @property
    def authenticated(self) -> bool:
        """Whether the client may say anything, and not only who it is."""
        return self.key is not None or not self.server.needs_key

    def authenticate(self, message: ClientMessage, whose: Callable[[str], str | None]) -> None:
        """Let in a message of a client that is known, or by which it becomes so; `whose` gives the name of a key's owner.

        Raises:
            Refusal: `unauthenticated`, and then nothing about the message is looked at.
            WrongKey: the same, where there was a key.
            TooManyWrongKeys: `rate_limited`, where the key was not even compared.
        """
        if self.authenticated:
            return
        id: str | None = getattr(message, "id", None)
        if not isinstance(message, Init) or message.token is None:
            raise Refusal("unauthenticated", KEY_FIRST, id, isinstance(message, Generate))
        try:
            self.key = whose(message.token)
        except TooManyGuesses as guesses:
            raise TooManyWrongKeys("rate_limited", TOO_MANY_GUESSES, id, retry_after=guesses.seconds) from None
        if self.key is None:
            raise WrongKey("unauthenticated", WRONG_KEY, id)

    def heard(self, text: str, now: float) -> None:
        """Count a message, read at `now` seconds, whatever it says.

        Raises:
            TooManyMessages: it is one too many of those that came too fast, with none between that did not.
            Refusal: `rate_limited`; what else it says was not read.
        """
        counts = weight(text)
        self._wait = self._messages.take(now, counts) or self.account.messages.take(now, counts)
        self._fast_messages = self._fast_messages + 1 if self._wait else 0
        if self._fast_messages > self.max_bad_messages:
            raise TooManyMessages
        if self._wait and self.authenticated and (known := head(text)) and known[0] is not Cancel:
            raise Refusal("rate_limited", TOO_FAST, known[1], known[0] is Generate, self._wait)

    def understood(self, message: ClientMessage, now: float) -> None:
        """Take the message just heard, now that it could be decoded: the bad ones before it are forgiven.

        A cancel is always taken: it makes work less.

        Raises:
            Refusal: `rate_limited`.
        """
        self._bad_messages = 0
        generates = isinstance(message, Generate)
        seconds, why = self._wait, TOO_FAST
        if generates and not seconds:
            seconds, why = self.account.tokens.wait(now), TOO_MANY_TOKENS
        if seconds and not isinstance(message, Cancel):
            raise Refusal("rate_limited", why, getattr(message, "id", None), generates, seconds)

    def open(self, message: Init | Generate | Resume) -> str:
        """Let in what opens an id; give the id, the client's or a new one.

        Raises:
            Refusal: `duplicate_id`, `shutting_down` or `overloaded`.
        """
        if message.id in self._open:
            raise Refusal(
                "duplicate_id", f"$.id: {message.id!r} is still active here; pick another id or wait for its end", message.id
            )
        generates = isinstance(message, Generate)
        # What is resumed runs already, and may finish like everything that does.
        if self.server.draining and not isinstance(message, Resume):
            raise Refusal("shutting_down", SHUTTING_DOWN, message.id, generates)
        if len(self._open) >= self.max_open:
            why = f"{self.max_open} requests are active on this connection; wait for one to end"
            raise Refusal("overloaded", why, message.id, generates)
        if not isinstance(message, Resume) and (much := self.account.too_many()):
            raise Refusal("overloaded", much, message.id, generates)
        id = self._assign() if message.id is None else message.id
        self._open[id] = _Open(OPENING[type(message)], message)
        if isinstance(message, Init):
            self._inits.append(message)
        return id

    def cancel(self, message: Cancel, now: float) -> list[str]:
        """Take a cancel, read at `now` seconds; give the ids that are to be stopped because of it.

        A second cancel of an id finds it stopping already, and gives nothing.

        Raises:
            Refusal: `not_active`, harmless.
        """
        if message.id is None and not self._open:
            raise Refusal("not_active", "nothing is active on this connection")
        if message.id is not None and message.id not in self._open:
            raise Refusal("not_active", f"$.id: {message.id!r} is not active here; it has ended or never began", message.id)
        return self.stop(list(self._open) if message.id is None else [message.id], "cancelled", now)

    def answer(self, refusal: Refusal) -> ServerMessage:
        """Give the frame that answers a refused message: a done where a generation was asked for, otherwise an error.

        Raises:
            TooManyBadMessages: instead of the answer to one bad message too many, none of them good between.
        """
        if refusal.code in ("bad_json", "bad_message", "unknown_type", "unauthenticated"):
            self._bad_messages += 1
            if self._bad_messages > self.max_bad_messages:
                raise TooManyBadMessages
        if not refusal.answers_with_done or refusal.id in self._open:
            return Error(code=refusal.code, message=refusal.message, id=refusal.id, retry_after_ms=refusal.retry_after_ms)
        return failed(refusal.id or self._assign(), refusal)

    # The server's side.

    def stop(self, ids: list[str], reason: StopReason, now: float) -> list[str]:
        """Mark ids as stopping: from here on nothing but their end is let out. Give those that were not stopping yet."""
        fresh = [id for id in ids if self._open[id].stop is None]
        for id in fresh:
            self._open[id].stop, self._open[id].stopped_at = reason, now
        return fresh

    def admit(self, frame: ServerMessage, now: float) -> ServerMessage | None:
        """Let out a frame about an open id, in the form in which it may go; None if a stop has overtaken it.

        The race between a generation's end and its cancel is decided here: a done that comes after the cancel was read
        says "cancelled", whatever it was going to say, because tokens before it may have been dropped.

        Raises:
            IllegalFrame: the frame cannot follow what was let out before.
        """
        id = getattr(frame, "id", None)
        if id not in self._open:
            raise IllegalFrame(f"{type(frame).__name__} for an id that is not open")
        entry = self._open[id]
        try:
            after = TRANSITIONS[entry.phase, type(frame)]
        except KeyError:
            raise IllegalFrame(f"{type(frame).__name__} while {entry.phase.value}") from None
        if after is None:
            del self._open[id]
            frame = self._end(frame, entry, now)
            self._settle(entry.message, isinstance(frame, Ready))
            return frame
        entry.phase = after
        if isinstance(frame, Queued):
            # Two lines follow each other, that of a load and that of the engine: a place is told when it changes.
            moved, entry.position = frame.position != entry.position, frame.position
            if not moved:
                return None
        return None if entry.stop else frame

    def forget(self) -> None:
        """Close all ids: nothing more is said about any of them, and nothing is left to be stopped."""
        self._open.clear()

    def has(self, id: str) -> bool:
        """Whether an id is open."""
        return id in self._open

    def info(self) -> ConnectionInfo:
        """Give this connection's part of a status."""
        return ConnectionInfo(session=self.id, active=list(self._open))

    @property
    def owner(self) -> Owner:
        """Whose requests these are, as far as that is known: a key's, or an address's."""
        return self.address if self.key is None else Owner("key", self.key)

    @property
    def account(self) -> Account:
        """What the owner has and did, on all connections."""
        return self.server.accounts.of(self.owner)

    @property
    def chosen(self) -> Init:
        """The init that says which model the next generate uses."""
        return self._inits[-1]

    @property
    def active(self) -> list[str]:
        """The open ids, oldest first."""
        return list(self._open)

    def _end(self, frame: ServerMessage, entry: _Open, now: float) -> ServerMessage:
        if entry.stop is None or isinstance(frame, Detached):
            return frame
        if isinstance(frame, Done):
            return stopped(frame, entry.stop, now - entry.stopped_at)
        id = getattr(frame, "id", None)
        if entry.stop == "cancelled":
            return Error(code="cancelled", message="the load was cancelled", id=id)
        return Error(code="shutting_down", message=SHUTTING_DOWN, id=id)

    def _settle(self, message: Init | Generate | Resume, loaded: bool) -> None:
        # A failed init leaves the connection with the model it would have had without it.
        place = next((i for i, init in enumerate(self._inits) if init is message), None)
        if place is not None:
            del self._inits[slice(0, place) if loaded else slice(place, place + 1)]

    def _assign(self) -> str:
        while True:
            self._assigned += 1
            id = f"auto-{self._assigned}"
            if id not in self._open:
                return id


def failed(id: str, refusal: Refusal) -> Done:
    """Give the done of a generation that never ran."""
    return Done(
        id=id,
        finish_reason="error",
        usage=Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0),
        timings=Timings(total_ms=0.0),
        error=ErrorDetail(code=refusal.code, message=refusal.message, retry_after_ms=refusal.retry_after_ms),
    )


def stopped(done: Done, reason: StopReason, seconds: float) -> Done:
    """Give a done as it reads when a stop, read so many seconds ago, came before it."""
    cancel_ms = round(seconds * 1000, 3) if reason == "cancelled" else None
    return replace(done, finish_reason=reason, error=None, timings=replace(done.timings, cancel_ms=cancel_ms))
