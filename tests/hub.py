"""A hub on a real socket: what of its API a download uses, as huggingface.co answers it, and its ways to go wrong."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".gguf", ".pth", ".onnx")


@dataclass
class Repository:
    """A repository's files at a commit, and what its hub does wrong."""

    files: dict[str, bytes]
    commit: str
    gated: bool = False
    sent: dict[str, bytes] = field(default_factory=dict)  # other bytes than the listing tells of
    sizes: dict[str, int] = field(default_factory=dict)  # other sizes than the files have
    tells_all_at_once: bool = True
    listed: dict[str, Any] = field(default_factory=dict)  # other values than its listing has
    more: list[Any] = field(default_factory=list)  # files that are listed beside its own
    lengths: dict[str, str] = field(default_factory=dict)  # other Content-Lengths than the bodies have


@dataclass
class Request:
    """What was asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class Hub(ThreadingHTTPServer):
    """Its repositories by id and revision, the requests it got, and transfers that break or wait."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.breaks: dict[str, int] = {}  # a file's first transfer ends after so many bytes
        self.waits: dict[str, int] = {}  # a file's transfer waits after so many bytes
        self.reached = threading.Event()
        self.let_on = threading.Event()
        self.answers_with: int | None = None
        self.says = b'{"error":"no"}'  # when it refuses
        self.large_files_at: Hub = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, id: str, files: dict[str, bytes], revision: str = "main", **more: Any) -> Repository:
        self.repositories[id, revision] = repository = Repository(files, blob_id(revision.encode()), **more)
        return repository

    def downloads(self) -> list[str]:
        """Give the files whose bytes were asked for, in order."""
        found = [re.search("/resolve/[^/]+/(.+)", request.path) for request in self.requests if request.method == "GET"]
        return [match[1] for match in found if match]

    def ranges(self) -> list[str]:
        return [request.range for request in self.requests if request.range]


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(Request(self.command, path, self.headers["Range"], self.headers["Authorization"]))
        if self.server.answers_with:
            self.refuse(self.server.answers_with, None)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.describe(found[1], unquote(found[2]))
        elif found := re.fullmatch(r"/(?:cdn/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            self.refuse(404, None)

    def repository(self, id: str, revision: str) -> Repository | None:
        of_id = {key: repository for (name, key), repository in self.server.repositories.items() if name == id}
        of_id |= {repository.commit: repository for repository in of_id.values()}
        if revision not in of_id:
            self.refuse(404, "RevisionNotFound" if of_id else "RepoNotFound")
        return of_id.get(revision)

    def describe(self, id: str, revision: str) -> None:
        if (repository := self.repository(id, revision)) is None:
            return
        siblings = []
        for name, content in repository.files.items():
            size = repository.sizes.get(name, len(content))
            sibling: dict[str, Any] = {"rfilename": name}
            if repository.tells_all_at_once:
                sibling |= {"size": size, "blobId": blob_id(content)}
                if name.endswith(LARGE):
                    sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(sibling)
        siblings += repository.more
        body = {
            "_id": "1",
            "id": id,
            "modelId": id,
            "sha": repository.commit,
            "siblings": siblings,
            "gated": False,
            "private": False,
        } | repository.listed
        self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, id: str, revision: str, name: str) -> None:
        if (repository := self.repository(id, revision)) is None:
            return
        content = repository.files[name]
        digest = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else blob_id(content)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if repository.gated and self.headers["Authorization"] != "Bearer good":
            self.refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
        elif name.endswith(LARGE) and self.command == "GET" and not self.path.startswith("/cdn/"):
            # Large files come from another place.
            self.send(
                302,
                b"",
                {"Location": f"{self.server.large_files_at.url}/cdn{self.path}", "X-Linked-Etag": f'"{digest}"'} | headers,
            )
        else:
            if name in repository.lengths and (self.command == "GET" or not repository.tells_all_at_once):
                headers["Content-Length"] = repository.lengths[name]
            self.send_range(name, repository.sent.get(name, content), headers)

    def send_range(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=([0-9]+)-", self.headers["Range"] or "")
        start = int(found[1]) if found else 0
        if found:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if (cut := self.server.breaks.pop(name, None)) is not None:
            self.send(206 if found else 200, body, headers, first=cut)
            self.close_connection = True
        elif name in self.server.waits and not self.server.let_on.is_set():
            self.send(206 if found else 200, body, headers, first=self.server.waits[name])
            self.server.reached.set()
            self.server.let_on.wait()
            with suppress(ConnectionError):  # who waited may have gone
                self.wfile.write(body[self.server.waits[name] :])
        else:
            self.send(206 if found else 200, body, headers)

    def refuse(self, status: int, code: str | None) -> None:
        self.send(status, self.server.says, {"X-Error-Code": code} if code else {})

    def send(self, status: int, body: bytes, headers: dict[str, str], first: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # a client that is sent too much hangs up
                self.wfile.write(body[:first])


@contextmanager
def serving_models() -> Iterator[Hub]:
    """Run a hub."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.let_on.set()
            hub.shutdown()
            thread.join()


def blob_id(content: bytes) -> str:
    """Give git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
