"""Whose a key is: keys known by their hashes, the places of a handshake that may hold one, and wrong ones by address.

Pure: whoever calls brings what was read, and the time. A key is 256 random bits, and a plain SHA-256 is the right hash of
one: a slow hash makes guesses dear where a person chose the secret, and there is no guessing here at any speed, while every
wrong key would keep the event loop busy.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from websockets.datastructures import Headers
from websockets.headers import parse_subprotocol

from wsserver.limits import network_of
from wsserver.protocol import BEARER_SUBPROTOCOL

# Seconds in which wrong keys are counted together, and for which an address that sent too many is refused.
WINDOW = 60.0
# The most addresses whose wrong keys are remembered; the one that was silent longest is forgotten first.
MAX_REMEMBERED = 4096


def new_key() -> str:
    """Make a key, of letters, digits, "-" and "_": what may stand in a header and in the name of a subprotocol."""
    return f"sk-{secrets.token_urlsafe(32)}"


def digest(key: str) -> bytes:
    """Give the hash that a key is known by."""
    return hashlib.sha256(key.encode(errors="replace")).digest()


class TooManyGuesses(Exception):
    """So many wrong keys came from one place that no key from there is compared for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Keys:
    """The keys that are let in, by their owners' names. A server that had one at the start asks for one for ever."""

    def __init__(self, digests: Mapping[str, bytes]) -> None:
        self.required = bool(digests)
        self._digests = dict(digests)

    def replace(self, digests: Mapping[str, bytes]) -> None:
        """Let in these from now on, and no others."""
        self._digests = dict(digests)

    def whose(self, key: str) -> str | None:
        """Give the name of a key's owner, None if it is wrong; in a time that tells nothing of the keys there are."""
        given, owner = digest(key), None
        for name, known in self._digests.items():
            if hmac.compare_digest(known, given):
                owner = name
        return owner


def shown(headers: Headers) -> list[str]:
    """Give the keys that a request shows.

    Raises:
        InvalidHeader: its list of subprotocols is none.
    """
    bearers = [value.partition(" ") for value in headers.get_all("Authorization")]
    # Other schemes are somebody else's, such as a proxy's in front of this server.
    keys = [key.strip() for scheme, _, key in bearers if scheme.lower() == "bearer"]
    offered = [name for value in headers.get_all("Sec-WebSocket-Protocol") for name in parse_subprotocol(value)]
    return keys + [name.removeprefix(BEARER_SUBPROTOCOL) for name in offered if name.startswith(BEARER_SUBPROTOCOL)]


class Failures:
    """The wrong keys of the last minute, by the addresses they came from."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # How many there were, and until when they count; the address that failed last stands last.
        self._counted: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._counted)

    def add(self, address: str, now: float) -> None:
        """Count a wrong key that came at `now` seconds."""
        network = network_of(address)
        count, until = self._counted.pop(network, (0, 0.0))
        if now >= until:
            count, until = 0, now + WINDOW
        self._counted[network] = (count + 1, now + WINDOW if count + 1 == self._limit else until)
        if len(self._counted) > MAX_REMEMBERED:
            del self._counted[next(iter(self._counted))]

    def wait(self, address: str, now: float) -> float:
        """Give the seconds after which an address may come again, 0 if it may."""
        count, until = self._counted.get(network_of(address), (0, 0.0))
        return max(until - now, 0.0) if count >= self._limit else 0.0
