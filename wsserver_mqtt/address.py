"""Where the broker is and how it is talked to: what --mqtt-url and the options beside it say."""

import socket
import ssl
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from wsserver.auth import Keys
from wsserver.config import BadSetting, Config
from wsserver.origin import is_loopback

PORTS = {"mqtt": 1883, "mqtts": 8883}
EXAMPLE = "use one like mqtt://kitchen@127.0.0.1:1883, or mqtts:// for TLS"
IN_THE_OPEN = (
    "--mqtt-url: anybody who may publish on {host} could use this server; give it keys (`wsserver key add NAME`), "
    "or say --insecure on if the broker's access list sees to it"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A broker; without TLS what is said to it, the password too, can be read on the way."""

    host: str
    port: int
    user: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None


def address(url: str, password: str | None, ca: str = "", certificate: str = "", key: str = "") -> Address:
    """Give the broker that a URL means; the files are those of --mqtt-ca, --mqtt-cert and --mqtt-key.

    Raises:
        BadSetting: there can be none such, or a file of theirs cannot be used.
    """
    # It is not repeated: a password may be in it.
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadSetting(f"--mqtt-url: this is no URL; {EXAMPLE}") from None
    if parts.password is not None:
        # Everybody on a machine can read its command lines.
        raise BadSetting("--mqtt-url: leave the password out and put it into WSSERVER_MQTT_PASSWORD")
    if parts.scheme not in PORTS or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise BadSetting(f"--mqtt-url: this is no broker's; {EXAMPLE}")
    user = unquote(parts.username) if parts.username else None
    if password is not None and user is None:
        raise BadSetting("--mqtt-url: there is a password, and no user; " + EXAMPLE)
    tls = _context(ca, certificate, key) if parts.scheme == "mqtts" else None
    if not tls and (ca or certificate or key):
        raise BadSetting("--mqtt-ca, --mqtt-cert and --mqtt-key are for brokers at mqtts://")
    return Address(parts.hostname, port or PORTS[parts.scheme], user, password, tls)


def see_to_keys(config: Config, keys: Keys, host: str) -> None:
    """See that only those can use a server without keys who are on its machine, unless its operator wants that.

    Raises:
        BadSetting: others could.
    """
    if not keys.required and not config.insecure and not is_loopback(host):
        raise BadSetting(IN_THE_OPEN.format(host=host))


def default_root() -> str:
    """Give the root of a server's topics where nothing is said."""
    return f"llm/{socket.gethostname()}"


def _context(ca: str, certificate: str, key: str) -> ssl.SSLContext:
    if bool(certificate) != bool(key):
        raise BadSetting("--mqtt-cert and --mqtt-key: give both; a file that holds the two can be named twice")
    try:
        context = ssl.create_default_context(cafile=ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate:
            context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:
        why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise BadSetting(f"--mqtt-ca, --mqtt-cert, --mqtt-key: {why}") from None
    return context


def _no_password() -> str:
    """Be asked for the password of a key instead of the terminal, where nobody may sit."""
    return ""
