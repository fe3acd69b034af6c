"""The topics that answers go to, by whose requests they answer, and how many of them there may be."""

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from wsserver.auth import Keys
from wsserver.limits import Owner
from wsserver.peer import Dispatch, Peer
from wsserver.protocol import ClientMessage, Generate, Refusal
from wsserver.server import Server
from wsserver.session import Session
from wsserver_mqtt.answered import Answered
from wsserver_mqtt.guesses import Guesses
from wsserver_mqtt.incoming import Incoming
from wsserver_mqtt.reply import Reply

TOO_FAST = "too many new topics for answers came in too short a time; use one for all requests of a client"
TOO_MANY_GUESSES = "$.token: too many wrong keys were shown here; try again in a minute"
TOO_MANY = "too many topics for answers are in use; wait for an answer, or use one for all requests of a client"

log = logging.getLogger(__name__)


class Replies:
    """Every topic that was answered lately. One that is not used makes room for another one."""

    def __init__(self, server: Server, keys: Keys, dispatch: Dispatch, on_news: Callable[[Reply], None]) -> None:
        self._server = server
        self._config = server.state.config
        self._keys = keys
        self._dispatch = dispatch
        self._on_news = on_news
        self._guesses = Guesses(self._config.max_auth_failures)
        self._answered = Answered(self._config.resume_window)
        self._replies: OrderedDict[tuple[str, Owner], Reply] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replies)

    def hear(self, message: Incoming) -> None:
        """Take a message in, and answer it."""
        now = time.monotonic()
        try:
            key = self._key(message, now)
        except Refusal as refusal:
            self.refuse(message, refusal)
            return
        owner = Owner("mqtt", message.user) if key is None else Owner("key", key)
        if key is None and self._keys.required:
            self._make(message, owner, key, self._dispatch).hear(message)  # which refuses whatever it says
            return
        try:
            reply = self._find(message, owner, key, now)
        except Refusal as refusal:
            self._make(message, owner, key, _refusing(refusal)).hear(message)
        else:
            reply.hear(message)

    def refuse(self, message: Incoming, refusal: Refusal) -> None:
        """Answer a message without looking at whose it is."""
        self._make(message, Owner("mqtt", message.user), None, self._dispatch).refuse(message, refusal)

    def give_up(self) -> None:
        """Stop everything that runs: nobody can hear of it."""
        for reply in self._replies.values():
            reply.peer.stop_all("cancelled")

    async def leave(self) -> None:
        """End everything that is left."""
        for reply in self._replies.values():
            reply.peer.leave()
        for reply in self._replies.values():
            await reply.peer.left()
        self._server.guests.difference_update(self._replies.values())

    def _key(self, message: Incoming, now: float) -> str | None:
        """Return the name of the key that a message shows.

        Raises:
            Refusal: `rate_limited`, there were too many wrong ones; this one was not compared.
        """
        if not self._keys.required or message.token is None:
            return None
        if seconds := self._guesses.wait(message.user, message.reply, now):
            raise Refusal("rate_limited", TOO_MANY_GUESSES, retry_after=seconds)
        key = self._keys.whose(message.token)
        if key is not None:
            self._guesses.right(message.user, message.reply)
        else:
            self._guesses.wrong(message.user, message.reply, now)
            log.warning("%.200a: a wrong key", message.reply)
        return key

    def _find(self, message: Incoming, owner: Owner, key: str | None, now: float) -> Reply:
        place = (message.reply, owner)
        if place not in self._replies:
            self._make_room(owner, now)
            self._replies[place] = self._make(message, owner, key, self._dispatch)
            self._server.guests.add(self._replies[place])
        self._replies.move_to_end(place)
        return self._replies[place]

    def _make(self, message: Incoming, owner: Owner, key: str | None, dispatch: Dispatch) -> Reply:
        state = self._server.state
        open_at_most = self._config.max_requests_per_connection
        session = Session(secrets.token_urlsafe(9), state, key, open_at_most, address=owner, user=message.user or None)
        return Reply(message.reply, session, self._server.resumables, self._answered, dispatch, self._on_news)

    def _make_room(self, owner: Owner, now: float) -> None:
        """See that there is room for one more; the one that was used longest ago leaves.

        Raises:
            Refusal: `rate_limited` or `overloaded`.
        """
        if seconds := self._server.state.accounts.of(owner).handshakes.take(now):
            raise Refusal("rate_limited", TOO_FAST, retry_after=seconds)
        places = [place for place in self._replies if place[1] == owner]
        if len(places) < self._config.max_connections_per_address:
            places = list(self._replies)
            if len(places) < self._config.max_connections:
                return
        idle = next((place for place in places if self._replies[place].idle), None)
        if idle is None:
            raise Refusal("overloaded", TOO_MANY)
        self._server.guests.discard(self._replies.pop(idle))


def _refusing(refusal: Refusal) -> Dispatch:
    """Give what refuses every message for the same reason."""

    def dispatch(message: ClientMessage, peer: Peer) -> None:
        id: str | None = getattr(message, "id", None)
        raise Refusal(refusal.code, refusal.message, id, isinstance(message, Generate), refusal.retry_after)

    return dispatch
