"""The chat page and client.js: files read once, and the headers under which a browser may use them. Knows no sockets."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from websockets.datastructures import Headers
from websockets.http11 import Response

WEB = Path(__file__).parent / "web"
FRONT = "index.html"
# The client may be used by any page; which ones may connect, the handshake decides.
FOR_ALL_PAGES = ("client.js", "client.d.ts")

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# A page shows what a model says, and models say what they were told to by others: whatever slips through into a page may
# run nothing, load nothing from elsewhere, and tell nobody. Where browsers know trusted types, no text can become markup.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{directive} {value}" for directive, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Connection": "close",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file, ready to be sent."""

    body: bytes
    headers: Mapping[str, str]

    def response(self) -> Response:
        """Give the answer to one GET; the library adds to its headers, so each is a new one."""
        return Response(HTTPStatus.OK.value, HTTPStatus.OK.phrase, Headers(self.headers), self.body)


def load_pages(folder: Path = WEB) -> dict[str, Page]:
    """Read every file, by the path that it is asked for."""
    pages = {f"/{path.relative_to(folder).as_posix()}": _page(path) for path in folder.rglob("*") if path.is_file()}
    return {"/": pages[f"/{FRONT}"]} | pages


def _page(path: Path) -> Page:
    body = path.read_bytes()
    headers = {
        **HEADERS,
        "Content-Type": CONTENT_TYPES.get(path.suffix, "text/plain; charset=utf-8"),
        "Content-Length": str(len(body)),
    }
    if path.name in FOR_ALL_PAGES:
        headers["Access-Control-Allow-Origin"] = "*"
    return Page(body, headers)
