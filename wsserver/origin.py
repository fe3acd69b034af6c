"""Where a request comes from: which pages may connect, and under which names the server is known. Pure.

A browser lets any page open any WebSocket, and says in Origin which page it is: the server has to refuse those of others. In
Host it says under which name it has found the server: a page can let a name of its own point to a loopback address ("DNS
rebinding"), and would be of the same origin then.
"""

import ipaddress
import re
from collections.abc import Collection

DEFAULT_PORTS = {"http": 80, "https": 443}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_NAME = r"[a-z0-9._~%-]+|\[[0-9a-f:.]+\]"
_ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]*)://({_NAME})(?::([0-9]{{1,5}}))?")
_HOST = re.compile(rf"({_NAME})(?::([0-9]{{1,5}}))?")


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # some other name, or every address


def normal_origin(text: str) -> str | None:
    """Give an origin in the form in which two are compared; None if it is no origin."""
    if text == "null":
        return text
    found = _ORIGIN.fullmatch(text.lower())
    if not found:
        return None
    scheme, name, port = found.groups()
    return f"{scheme}://{name}" + (f":{int(port)}" if port and int(port) != DEFAULT_PORTS.get(scheme) else "")


def origin_may_connect(origin: str, host: str, allowed: Collection[str]) -> bool:
    """Whether pages of an origin may connect: those from the place that Host names, and those of a list."""
    normal = normal_origin(origin)
    if normal is None:
        return False
    scheme = normal.partition("://")[0]
    # Whether it was http or https cannot be told behind a proxy, nor does it matter.
    own = scheme in DEFAULT_PORTS and normal == normal_origin(f"{scheme}://{host}")
    return own or normal in map(normal_origin, allowed)


def is_host(text: str) -> bool:
    """Whether a text is a host as a Host header may have it, with or without a port."""
    return bool(_HOST.fullmatch(text.lower()))


def host_is_known(host: str, served: str, port: int, default_port: int, allowed: Collection[str]) -> bool:
    """Whether a Host header has a name of this server, which listens at `served` and `port`.

    On a loopback address those are its names, at its port; everywhere those in a list, at any port if they have none.
    Without either there is nothing to compare with.
    """
    loopback = is_loopback(served)
    if not loopback and not allowed:
        return True
    found = _HOST.fullmatch(host.lower())
    if not found:
        return False
    name, asked = found[1], int(found[2] or default_port)
    own = loopback and asked == port and name in (*LOOPBACK, served, f"[{served}]")
    return own or not {name, f"{name}:{asked}"}.isdisjoint(entry.lower() for entry in allowed)
