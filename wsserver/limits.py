"""How much one client may have at once and do in a time: token buckets and counts, by key or address.

Pure: no sockets, tasks or timers; whoever calls brings the time. A client is a key, or an address where there is no key.
"""

import ipaddress
import math
from collections import OrderedDict
from http import HTTPStatus
from typing import NamedTuple

from wsserver.config import Config

# How many seconds' worth a bucket holds: what may come at once after a quiet time.
BURST_SECONDS = 10.0
# How many connections an address may open for each of its handshakes: a page is made of many files, each on one of its own.
CONNECTIONS_PER_HANDSHAKE = 10
# How many connections' messages and frames one client may send on all of them: without that a new one would start anew.
CONNECTIONS_HEARD = 10
# Frames for each message that may be sent, since it may come in pieces and pings between them.
FRAMES_PER_MESSAGE = 4
# For how many characters, and for how many brackets, a message counts once more: what takes long to read.
LONG_MESSAGE = 4096
MANY_BRACKETS = 256
# Bytes of resumed answers that count like a message, in a bucket of their own: one who has resumed a long answer may go on.
REPLAYED_BYTES = 4096
# Clients that are remembered; those who have nothing here go first.
REMEMBERED = 10_000


class TokenBucket:
    """Fills by `rate` a second up to `burst`; what takes more than there is leaves a debt, to be waited for."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = max(burst, 1.0)
        self._level = self._burst
        self._filled_at = -math.inf

    def wait(self, now: float) -> float:
        """Give the seconds until one can be taken, 0 if it can be now."""
        self._fill(now)
        return max(1.0 - self._level, 0.0) / self._rate

    def spend(self, amount: float, now: float) -> None:
        """Take so much, whether it is there or not."""
        self._fill(now)
        self._level -= amount

    def take(self, now: float, amount: float = 1.0) -> float:
        """Take so much if one can be taken, and give 0; else give the seconds to wait, and take nothing."""
        seconds = self.wait(now)
        if not seconds:
            self.spend(amount, now)
        return seconds

    def _fill(self, now: float) -> None:
        # The clock may stand still between two calls, and a caller may have read it before another one did.
        if now > self._filled_at:
            self._level = min(self._level + (now - self._filled_at) * self._rate, self._burst)
            self._filled_at = now


def bucket(rate: float) -> TokenBucket:
    """Make a bucket that holds what comes in ten seconds."""
    return TokenBucket(rate, BURST_SECONDS * rate)


def weight(text: str) -> int:
    """Give for how many a message counts. Brackets may be text too: they are told apart only when it is read."""
    return 1 + len(text) // LONG_MESSAGE + (text.count("[") + text.count("{")) // MANY_BRACKETS


class Owner(NamedTuple):
    """Whose account it is: the name of a key, or an address."""

    kind: str
    name: str


class Account:
    """What one client has and did: its connections, its requests that wait or run, its tokens."""

    def __init__(self, config: Config) -> None:
        self.connections = 0
        self.requests = 0  # those that wait and those that run
        self.queued = 0  # of them, those that wait
        self.arrivals = bucket(CONNECTIONS_PER_HANDSHAKE * config.handshakes_per_second)
        self.handshakes = bucket(config.handshakes_per_second)
        self.messages = bucket(CONNECTIONS_HEARD * config.messages_per_second)
        self.frames = bucket(CONNECTIONS_HEARD * FRAMES_PER_MESSAGE * config.messages_per_second)
        self.loads = TokenBucket(config.loads_per_minute / 60, config.loads_per_minute)
        self.replays = bucket(CONNECTIONS_HEARD * config.messages_per_second)
        self.tokens = TokenBucket(config.tokens_per_minute / 60, config.tokens_per_minute)
        self._config = config

    def too_many(self) -> str | None:
        """Say of what it has too much for one more request, in words; None if it may have one."""
        if self.requests >= self._config.max_requests_per_key:
            return f"{self.requests} requests of this client are active; wait for one to end"
        if self.queued >= self._config.max_queued_per_key:
            return f"{self.queued} requests of this client wait in line; wait for one to start"
        return None

    @property
    def used(self) -> bool:
        """Whether its client has anything here."""
        return bool(self.connections or self.requests)


class Bill:
    """What one request costs its client: a place among its requests, one in line until it starts, and its tokens."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._charged = 0
        self._waits = self._open = True
        account.requests += 1
        account.queued += 1

    def charge(self, tokens: int, now: float) -> None:
        """Let the request have cost so many tokens in all, up to now; a bill never gets smaller."""
        self._account.tokens.spend(max(tokens - self._charged, 0), now)
        self._charged = max(tokens, self._charged)

    def start(self) -> None:
        """Give the place in line back."""
        self._account.queued -= self._waits
        self._waits = False

    def settle(self) -> None:
        """Give everything back but the tokens."""
        self.start()
        self._account.requests -= self._open
        self._open = False


class Accounts:
    """The accounts of all clients, and how many connections they have together."""

    def __init__(self, config: Config) -> None:
        self.connections = 0
        self._config = config
        self._accounts: OrderedDict[Owner, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, owner: Owner) -> Account:
        """Give a client's account."""
        account = self._accounts.get(owner)
        if account is None:
            self._make_room()
            account = self._accounts[owner] = Account(self._config)
        self._accounts.move_to_end(owner)
        return account

    def enter(self, address: Owner, now: float) -> HTTPStatus | None:
        """Let a connection in, which has then to be let out by `leave`; or give the status that turns it away."""
        if self.connections >= self._config.max_connections:
            return HTTPStatus.SERVICE_UNAVAILABLE
        account = self.of(address)
        if account.connections >= self._config.max_connections_per_address or account.arrivals.take(now):
            return HTTPStatus.TOO_MANY_REQUESTS
        account.connections += 1
        self.connections += 1
        return None

    def leave(self, address: Owner) -> None:
        """Let out a connection that was let in."""
        self.of(address).connections -= 1
        self.connections -= 1

    def _make_room(self) -> None:
        # Of those that have nothing here the one seen longest ago is forgotten, with what it owes. The others go behind it,
        # so that the next search does not meet them again.
        if len(self._accounts) < REMEMBERED:
            return
        for _ in range(len(self._accounts)):
            oldest, account = next(iter(self._accounts.items()))
            if not account.used:
                del self._accounts[oldest]
                return
            self._accounts.move_to_end(oldest)


def address_of(peername: object) -> Owner:
    """Give whose a peer's address is."""
    return Owner("address", network_of(str(peername[0]) if isinstance(peername, tuple) else ""))


def network_of(address: str) -> str:
    """Give what stands for an address: an IPv4 one itself, or the /64 network in which one client may take any of IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address  # a socket of this machine has none
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((int(ip), 64), strict=False))
        ip = ip.ipv4_mapped
    return str(ip)
