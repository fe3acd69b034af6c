"""One topic that answers go to: the link of a peer. Knows no broker; what it has to send is taken from it.

A topic is to MQTT what a connection is to a WebSocket: ids are its own, and an init chooses the model of what follows.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from wsserver.outbox import Outbox, OutboxFull
from wsserver.peer import Dispatch, Peer
from wsserver.protocol import (
    Cancel,
    ClientMessage,
    CloseCode,
    Detached,
    Done,
    Error,
    Generate,
    Goaway,
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
    Token,
    decode,
    encode,
)
from wsserver.resumables import Resumables
from wsserver.session import Session, TooManyBadMessages, TooManyMessages, WrongKey
from wsserver_mqtt.answered import Answered, Asked
from wsserver_mqtt.incoming import CANCELS_ONLY, Incoming
from wsserver_mqtt.messages import Outgoing
from wsserver_mqtt.pace import Pace

log = logging.getLogger(__name__)

NO_TEXT = "the payload is no UTF-8, or longer than the {} bytes that this server takes"
MAX_REPLAY_BYTES = 65_536
# What may be lost on the way: the done says it all again. An end, or an answer to a bad message, comes at least once.
MAY_BE_LOST = (Token, Queued, Started, Prefill, Loading, Resumed)
# What may become one frame with the next one of its id.
MAY_JOIN = (Token, Queued, Prefill, Loading)
# What may be the last frame of an id.
ENDS = (Done, Ready, Error, Detached)
# Ends that are told again to who asks the same again; after any other one it is tried anew.
KEPT = ("stop", "length", "cancelled")


@dataclass(slots=True)
class _Request:
    """What is known of an id beside what the session knows, until its end was sent."""

    message: Generate | Init | Resume
    digest: bytes  # of the message's text
    correlation: bytes | None
    texts: list[str] = field(default_factory=list)
    expiry: asyncio.TimerHandle | None = None


class Reply:
    """One client's topic, and what is still to be published there."""

    def __init__(
        self,
        topic: str,
        session: Session,
        resumables: Resumables,
        answered: Answered,
        dispatch: Dispatch,
        on_news: "Callable[[Reply], None]",
    ) -> None:
        config = session.server.config
        self.topic = topic
        self.peer = Peer(session, self, resumables)
        self.replay_bytes = min(config.max_outbox_bytes // 4, MAX_REPLAY_BYTES)
        self._answered = answered
        self._handle = dispatch
        self._on_news = on_news
        self._outbox = Outbox(config.max_outbox_bytes)
        self._pace = Pace(config.mqtt_interval)
        self._release_at: asyncio.TimerHandle | None = None
        self._requests: dict[str, _Request] = {}
        # The correlation data of frames that join no others; those of tokens are with their ids.
        self._correlations: dict[int, bytes | None] = {}
        self._heard: Incoming | None = None  # the message that is being answered
        self._all_sent = asyncio.Event()
        self._all_sent.set()

    @property
    def idle(self) -> bool:
        """Whether everything that was asked here was answered, and the answers were sent."""
        return self._all_sent.is_set() and not self.peer.session.active

    def hear(self, message: Incoming) -> None:
        """Take one message; whatever is wrong with it is answered, unless there was too much of that."""
        self._heard = message
        try:
            if message.text is None:
                limit = self.peer.session.server.config.max_message_bytes
                self.push(self.peer.session.answer(Refusal("bad_message", NO_TEXT.format(limit))))
            else:
                self.peer.hear(message.text, self._dispatch, _nobody)
        except WrongKey:
            pass  # it was answered, and nothing is kept of one who has no key
        except (TooManyBadMessages, TooManyMessages) as error:
            log.info("session %s: not answering, %s", self.peer.session.id, type(error).__name__)
        finally:
            self._heard = None

    def refuse(self, message: Incoming, refusal: Refusal) -> None:
        """Answer a message with a refusal, whatever it asks for."""
        session = self.peer.session
        self._heard = message
        try:
            asked = decode(message.text or "", session.server.config.max_json_depth)
            id: str | None = getattr(asked, "id", None)
            told = Refusal(refusal.code, refusal.message, id, isinstance(asked, Generate), refusal.retry_after)
            self.push(session.answer(told))
        except Refusal:  # it cannot be read; what is wrong with that is said when there is time
            self.push(session.answer(refusal))
        finally:
            self._heard = None

    # For the peer.

    def push(self, frame: ServerMessage) -> None:
        """Publish a frame in its turn, tokens no more often than the interval says."""
        request = self._requests.get(getattr(frame, "id", None) or "")
        if request and isinstance(frame, Token):
            request.texts.append(frame.text)
        elif request and isinstance(frame, Started) and request.expiry:
            request.expiry.cancel()
        elif request and isinstance(frame, Done):
            frame = self._end(request, frame)
        for ready in self._pace.push(frame, time.monotonic()):
            self._enqueue(ready)
        self._look()

    def has_room(self, frame: ServerMessage) -> bool:
        """Whether a frame may be pushed now; one that may not waits until the broker has taken everything."""
        request = self._requests.get(getattr(frame, "id", None) or "")
        if request and isinstance(frame, Done) and frame.text is None:  # its text is put in here
            frame = replace(frame, text="".join(request.texts))
        return self._all_sent.is_set() or self._outbox.has_room(frame)

    def give_up(self, why: str) -> None:
        """Stop all work: the broker takes too little."""
        log.warning("session %s: giving up, the broker takes too little: %s", self.peer.session.id, why)
        self.peer.stop_all("cancelled")

    def drop_tokens(self, id: str) -> None:
        """Forget the tokens of an id that are not sent yet."""
        self._pace.drop(id)
        self._outbox.drop_tokens(id)
        self._look()

    async def emptied(self) -> None:
        """Wait until the broker's connection has taken everything; it has when this returns, perhaps not a turn later."""
        while not self._all_sent.is_set():
            await self._all_sent.wait()

    # For the server.

    def go_away(self, deadline: float) -> None:
        """Tell who waits for an answer that the server stops in `deadline` seconds."""
        if self.peer.session.active:
            self.push(Goaway(deadline_ms=round(deadline * 1000)))

    def close(self, code: CloseCode, reason: str) -> None:
        """Stop all work."""
        self.peer.leave()

    async def closed(self) -> None:
        """Wait until everything was taken by the broker's connection."""
        await self.emptied()

    # For the broker's connection.

    def take(self) -> Outgoing | None:
        """Take the oldest frame out, to be published; None if there is none."""
        frame = self._outbox.take()
        self._look()
        if frame is None:
            return None
        name = getattr(frame, "id", None) or ""
        request = self._requests.get(name)
        correlation = self._correlations.pop(id(frame), request.correlation if request else None)
        if isinstance(frame, ENDS) and not self.peer.session.has(name):
            self._requests.pop(name, None)
        return Outgoing(self.topic, encode(frame), int(not isinstance(frame, MAY_BE_LOST)), correlation=correlation)

    def _enqueue(self, frame: ServerMessage) -> None:
        try:
            self._outbox.push(frame)
        except OutboxFull:
            self.give_up("its outbox is full")
            if isinstance(frame, ENDS):
                self._requests.pop(getattr(frame, "id", None) or "", None)
            return
        if not isinstance(frame, MAY_JOIN):
            request = self._requests.get(getattr(frame, "id", None) or "")
            # What answers the message that is being heard goes with that one, whatever else runs under its id.
            answered = self._heard or request
            self._correlations[id(frame)] = answered.correlation if answered else None
        self._on_news(self)

    def _look(self) -> None:
        """See whether anything is still to be sent, and when."""
        due = self._pace.due()
        if self._outbox or due is not None:
            self._all_sent.clear()
        else:
            self._all_sent.set()
        if due is not None and self._release_at is None:
            delay = max(due - time.monotonic(), 0.0)
            self._release_at = asyncio.get_running_loop().call_later(delay, self._release)

    def _release(self) -> None:
        self._release_at = None
        for frame in self._pace.release(time.monotonic()):
            self._enqueue(frame)
        self._look()

    # The client's side.

    def _dispatch(self, message: ClientMessage, peer: Peer) -> None:
        heard = self._heard
        assert heard is not None
        assert heard.text, "it was decoded out of a text"
        if heard.only_cancels and not isinstance(message, Cancel):
            raise Refusal("bad_message", CANCELS_ONLY)
        if not isinstance(message, Generate | Init | Resume):
            self._handle(message, peer)
            return
        request = _Request(message, hashlib.sha256(heard.text.encode()).digest(), heard.correlation)
        if message.id is not None and self._repeats(message.id, request):
            return
        self._handle(message, peer)
        id = peer.session.active[-1]  # the one that was opened just now
        self._requests[id] = request
        if heard.expires_in:
            request.expiry = asyncio.get_running_loop().call_later(heard.expires_in, self._expire, id, request)

    def _repeats(self, id: str, request: _Request) -> bool:
        """Whether the same was asked before; what runs will be answered, what has ended is answered again."""
        if self.peer.session.has(id):
            running = self._requests.get(id)
            return running is not None and running.digest == request.digest
        done = self._answered.find(self._asked(id), request.digest, time.monotonic())
        if done and isinstance(request.message, Generate):
            self.push(replace(done))  # another one, which goes with the correlation data of this request
            return True
        return False

    def _end(self, request: _Request, done: Done) -> Done:
        if request.expiry:
            request.expiry.cancel()
        if done.text is None:
            done = replace(done, text="".join(request.texts))
        request.texts.clear()
        if done.finish_reason in KEPT and isinstance(request.message, Generate) and request.message.id is not None:
            self._answered.add(self._asked(done.id), request.digest, done, time.monotonic())
        return done

    def _expire(self, id: str, request: _Request) -> None:
        """Stop what has not started in time: nobody wants it any more."""
        if self._requests.get(id) is request and self.peer.session.has(id):
            now = time.monotonic()
            self.peer.stop(self.peer.session.stop([id], "cancelled", now), "cancelled", now)

    def _asked(self, id: str) -> Asked:
        return Asked(self.topic, self.peer.session.owner, id)


def _nobody(token: str) -> None:
    """Know no key: whose it is was asked before."""
