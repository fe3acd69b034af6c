"""Who may come in: looks at a request's Host, its Origin and its key before anything is served. Knows no messages."""

import http
import logging
import time
from collections.abc import Callable

from websockets.datastructures import Headers
from websockets.exceptions import InvalidHeader

from wsserver.auth import Failures, Keys, TooManyGuesses, shown
from wsserver.config import BadSetting, Config
from wsserver.origin import DEFAULT_PORTS, host_is_known, is_loopback, origin_may_connect

log = logging.getLogger(__name__)

STRANGERS = (
    "--host: anybody who reaches {host} could use this server; "
    "give it keys (`wsserver key add NAME --api-keys-file FILE`, or WSSERVER_API_KEY), or say --insecure on"
)
NO_KEYS = "--api-keys-file: {file} has no keys, so nobody could come in; `wsserver key add NAME` makes one"


class Denied(Exception):
    """Why a request is refused: the status of the answer, its one line, and its headers."""

    def __init__(self, status: http.HTTPStatus, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def see_to_keys(config: Config, keys: Keys) -> None:
    """See that only those can reach a server without keys who are on its machine, unless its operator wants that.

    Raises:
        BadSetting: others could; or there is a file of keys, and it is empty.
    """
    if keys.required:
        return
    if config.api_keys_file:
        raise BadSetting(NO_KEYS.format(file=config.api_keys_file))
    if not config.insecure and not is_loopback(config.host):
        raise BadSetting(STRANGERS.format(host=config.host or "every address"))


class Door:
    """Lets requests in, and knows who came with a key."""

    def __init__(self, config: Config, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._keys = keys
        self._clock = clock
        self._failures = Failures(config.max_auth_failures)

    def admit(self, headers: Headers, address: str, port: int, keyless: bool) -> str | None:
        """Let in a request that came from an address to a port; give the name of its key.

        Args:
            headers: what it says of itself.
            address: where it came from.
            port: where it came to.
            keyless: whether it may do without a key, for now or at all.

        Raises:
            Denied: it may not.
        """
        try:
            self._see_to_place(headers, port)
        except Denied:
            # What its operator may want to allow. As %a writes it, a client's text is one line of ASCII.
            log.info("%s: refused, Host %.200a, Origin %.200a", address, headers.get_all("Host"), headers.get_all("Origin"))
            raise
        return self._name(headers, address, keyless) if self._keys.required else None

    def whose(self, address: str, key: str) -> str | None:
        """Return the name of a key that came from an address; None if it is wrong, which is counted.

        Raises:
            TooManyGuesses: the address has used up its wrong keys; this one was not compared.
        """
        now = self._clock()
        if seconds := self._failures.wait(address, now):
            raise TooManyGuesses(seconds)
        name = self._keys.whose(key)
        if name is None:
            self._failures.add(address, now)
            log.warning("%s: a wrong key", address)
        return name

    def _see_to_place(self, headers: Headers, port: int) -> None:
        hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
        host = hosts[0] if len(hosts) == 1 else ""
        default_port = DEFAULT_PORTS["https" if self._config.tls_cert else "http"]
        if not host_is_known(host, self._config.host, port, default_port, self._config.allow_host):
            reason = "this server is not known under that name and port; --allow-host lets its operator say others"
            raise Denied(http.HTTPStatus.FORBIDDEN, reason)
        # Without one it is no page in a browser.
        if origins and not (len(origins) == 1 and origin_may_connect(origins[0], host, self._config.allow_origin)):
            reason = "pages of that origin may not connect; --allow-origin lets the operator say which may"
            raise Denied(http.HTTPStatus.FORBIDDEN, reason)

    def _name(self, headers: Headers, address: str, keyless: bool) -> str | None:
        if wait := self._failures.wait(address, self._clock()):
            reason = "too many wrong keys came from this address; try again in a minute"
            raise Denied(http.HTTPStatus.TOO_MANY_REQUESTS, reason, Retry_After=str(int(wait) + 1))
        try:
            keys = set(shown(headers))
        except InvalidHeader:
            # The library would repeat what it could not read, and a key may be in it.
            raise Denied(http.HTTPStatus.BAD_REQUEST, "Sec-WebSocket-Protocol is no list of names") from None
        if not keys and keyless:
            return None
        if len(keys) != 1:
            raise Denied(http.HTTPStatus.UNAUTHORIZED, "show one key: Authorization: Bearer KEY", WWW_Authenticate="Bearer")
        if name := self.whose(address, keys.pop()):
            return name
        raise Denied(http.HTTPStatus.UNAUTHORIZED, "the key is wrong", WWW_Authenticate="Bearer")
