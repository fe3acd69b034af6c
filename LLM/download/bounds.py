"""Bounds for what a hub sends: its listing, its errors, and the bytes of a file. A hub may be anybody's mirror."""

import json
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol

from huggingface_hub import get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from LLM.hub_files import NotFetched, size

# Bytes of a listing, and of the text of an error; the largest repositories list a few MB.
MAX_LISTING, MAX_ERROR = 32 << 20, 1 << 20
MAX_FILES = 10_000
LARGEST_FILE = 1 << 62
# Times that a hub may send a file from its beginning again: one that ignores what is there already never ends.
MAX_RESTARTS = 5


class Response(Protocol):
    """What is used of the client's response; the library brings a client of its own."""

    status_code: int
    headers: dict[str, str]


def bound_errors() -> None:
    """Let the library read no error whose text is too long, or of no stated length."""
    client = get_session()
    hooks = client.event_hooks
    if _refuse_long_error not in hooks["response"]:
        client.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_error]}


def listing(url: str, answered: Any) -> dict[str, Any]:
    """Get a listing's JSON object; `answered` gives the words for an HTTP status.

    Raises:
        NotFetched: it is too long.
        ValueError: it is no JSON object.
    """
    bound_errors()
    body = bytearray()
    headers = build_hf_headers(library_name="wsserver")
    with get_session().stream("GET", url, headers=headers, params={"blobs": True}, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 200:
            raise NotFetched(answered(response.status_code))
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_LISTING:
                raise NotFetched(f"the hub lists it in more than {size(MAX_LISTING)}; set HF_ENDPOINT to another one")
    try:
        found = json.loads(body)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict) or len(found.get("siblings") or ()) > MAX_FILES:
        raise ValueError("no listing, or too long a one")
    return found


def is_size(value: object) -> bool:
    """Whether a hub's word for a file's size is one."""
    return type(value) is int and 0 <= value <= LARGEST_FILE


def is_name(path: object) -> bool:
    """Whether a file of a hub may be called so: what cannot be shown or written is no file that a model needs."""
    if not isinstance(path, str) or not path.isprintable() or "\\" in path:
        return False
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/") and all(len(part.encode()) < 200 for part in parts)


class BoundedFile:
    """A file that takes no more bytes than it is to have; what a download needs of one."""

    def __init__(self, file: BinaryIO, path: str, most: int) -> None:
        self._file = file
        self._path = path
        self._most = most
        self._restarts = 0

    def write(self, data: bytes) -> int:
        """Write some bytes.

        Raises:
            NotFetched: they are more than the hub told of.
        """
        if self._file.tell() + len(data) > self._most:
            raise NotFetched(f"{self._path} is longer than the {self._most} bytes that the hub told of; choose another hub")
        return self._file.write(data)

    def tell(self) -> int:
        """Return the place in the file."""
        return self._file.tell()

    def seek(self, place: int) -> int:
        """Go to a place in the file."""
        return self._file.seek(place)

    def truncate(self) -> int:
        """Cut the file off here, to begin again.

        Raises:
            NotFetched: the hub does not go on where it stopped.
        """
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise NotFetched(f"the hub sends {self._path} from its beginning again and again; choose another hub")
        return self._file.truncate()


def _refuse_long_error(response: Response) -> None:
    if response.status_code < 300:
        return
    # Nothing that is read here needs to be packed; a few bytes may be gigabytes.
    response.headers.pop("Content-Encoding", None)
    stated = response.headers.get("Content-Length", "")
    redirects = response.status_code < 400 and not stated
    if not redirects and (not stated.isdecimal() or int(stated) > MAX_ERROR):
        raise NotFetched(f"the hub answered {response.status_code}, and with too long a text to be read")
