"""The messages as a client reads them, which may be older than its server. Pure; knows no connection and no order.

Most types are the server's own. Those that hold words of which a later server may know more take any word.
"""

from typing import Any, TypedDict

import msgspec
import orjson
from msgspec import Struct

from wsserver.protocol import (
    Detached,
    Goaway,
    Loading,
    Prefill,
    Queued,
    Ready,
    Resumed,
    Started,
    StatusReport,
    Timings,
    Token,
    TokenLogprob,
    Usage,
)


class ServerError(Exception):
    """What the server refused or failed at, by the protocol's code and in words; and after how many seconds to try again."""

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after = retry_after


class ConnectionLost(ConnectionError):
    """There is no connection, and none will come back; `code` is the one it was closed with, if it was."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Parameters(TypedDict, total=False):
    """What a generate may say beside its prompt or messages; what each of them does is said in protocol.md."""

    stream: bool
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    seed: int
    stop: str | list[str]
    stop_token_ids: list[int]
    logprobs: int
    ignore_eos: bool
    user: str


class Reason(Struct, kw_only=True):
    """Why something was refused, or failed."""

    code: str
    message: str
    retry_after_ms: int | None = None

    def as_error(self) -> ServerError:
        """Give it as what is raised."""
        return ServerError(self.code, self.message, None if self.retry_after_ms is None else self.retry_after_ms / 1000)


class Failure(Reason, kw_only=True, tag_field="type", tag="error"):
    """The answer to a message that could not be taken, or the end of a load."""

    id: str | None = None


class Done(Struct, kw_only=True, tag_field="type", tag="done"):
    """How an answer ended."""

    id: str
    finish_reason: str
    usage: Usage
    timings: Timings
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    error: Reason | None = None


# What tells how far a request is, before its first token.
Progress = Queued | Started | Prefill | Loading
Frame = Progress | Ready | Resumed | Token | Done | Detached | Failure | StatusReport | Goaway

FRAMES: dict[str, type[Frame]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (
        Loading,
        Ready,
        Queued,
        Started,
        Resumed,
        Prefill,
        Token,
        Done,
        Detached,
        Failure,
        StatusReport,
        Goaway,
    )
}


def encode(fields: dict[str, Any]) -> bytes:
    """Write a message as the UTF-8 of a text frame.

    Raises:
        TypeError: it holds what JSON has no form for.
    """
    return orjson.dumps(fields)


def decode(data: str | bytes) -> Frame | None:
    """Read a frame; None if it is of a type that a later version has brought.

    Raises:
        ConnectionLost: whoever is at the other end does not speak this protocol.
    """
    try:
        fields = orjson.loads(data)
        kind = FRAMES.get(fields["type"])
        return msgspec.convert(fields, kind) if kind else None
    except (ValueError, TypeError, KeyError, msgspec.ValidationError) as error:
        raise ConnectionLost(f"the server does not speak this protocol: {error}") from error
