"""The messages of protocol.md: their types, their validation, their JSON form. Pure; knows no connection and no order.

The types are the single source: validation, the JSON Schema and the tables of protocol.md are checked against them.
"""

import enum
import math
from typing import Annotated, Any, Literal, get_args

import msgspec
import orjson
from msgspec import Meta, Struct

VERSION = 1
SUBPROTOCOL = "llmstream.v1"
# What is offered beside it where a key can be shown in no header: this, and the key.
BEARER_SUBPROTOCOL = "llmstream.bearer."
MAX_MESSAGE_BYTES = 262_144  # unless the operator says otherwise

ErrorCode = Literal[
    "bad_json",
    "bad_message",
    "unknown_type",
    "duplicate_id",
    "not_active",
    "unauthenticated",
    "forbidden",
    "rate_limited",
    "model_not_found",
    "load_failed",
    "cancelled",
    "context_length_exceeded",
    "overloaded",
    "unsupported",
    "shutting_down",
    "internal",
    "resume_expired",
]
FinishReason = Literal["stop", "length", "cancelled", "timeout", "shutdown", "error"]


class CloseCode(enum.IntEnum):
    """Why the server closes a connection."""

    NORMAL = 1000
    GOING_AWAY = 1001
    UNSUPPORTED_DATA = 1003
    INVALID_TEXT = 1007
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    TRY_AGAIN_LATER = 1013
    TOO_MANY_BAD_MESSAGES = 4400
    NOT_AUTHENTICATED = 4401
    FORBIDDEN = 4403
    AUTHENTICATION_TIMEOUT = 4408
    READER_TOO_SLOW = 4413
    RATE_LIMITED = 4429


# Fields.
Role = Literal["system", "user", "assistant"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8", "nf4", "fp4"]
Id = Annotated[str, Meta(min_length=1, max_length=128)]
DEVICE = r"^(auto|cpu|cuda(:[0-9]{1,2})?)(?!\n)$"
Int63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]


class _Message(Struct, kw_only=True, omit_defaults=True, tag_field="type", tag=str.lower):
    """A message is one JSON object whose `type` is the class's name in lower case; unknown fields are ignored."""


class ChatMessage(Struct, kw_only=True):
    """One turn of a conversation."""

    role: Role
    content: str


# Client to server. A null says the same as leaving the field out.


class Init(_Message):
    """Picks, and where needed loads, the model of this connection."""

    id: Id | None = None
    model: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    quantization: Quantization | None = None
    dtype: Dtype | None = None
    device: Annotated[str, Meta(pattern=DEVICE)] | None = None
    token: str | None = None


class Generate(_Message):
    """Asks for one answer, to a conversation or to raw text."""

    id: Id | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Int63 | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    ignore_eos: bool | None = None
    resumable: bool | None = None
    user: Id | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("send exactly one of messages and prompt")


class Cancel(_Message):
    """Stops one generation or load; without an id, everything of this connection."""

    id: Id | None = None


class Resume(_Message):
    """Takes up a resumable generation whose connection was lost; `after_seq` is the next `seq` that the client expects."""

    id: Id
    resume_token: Annotated[str, Meta(min_length=1, max_length=128)]
    after_seq: Int63 = 0


class Status(_Message):
    """Asks what the server is doing."""


ClientMessage = Init | Generate | Cancel | Resume | Status


# Server to client.


class Loading(_Message):
    """How far a load is."""

    id: str
    model: str
    stage: str
    progress: float


class ModelInfo(Struct, kw_only=True):
    """The model a connection uses."""

    id: str
    context_length: int
    dtype: str
    quantization: str
    device: str


class Limits(Struct, kw_only=True, omit_defaults=True):
    """What a client may count on."""

    max_message_bytes: int
    max_active: int
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None


class Ready(_Message):
    """The answer to an init: the model is loaded."""

    id: str
    protocol: int
    server: str
    session: str
    model: ModelInfo
    limits: Limits


class Queued(_Message):
    """The request waits; position 1 is next."""

    id: str
    position: int


class Started(_Message):
    """The request's prefill begins; `resume_token` takes a resumable one up again on another connection."""

    id: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    resume_token: str | None = None


class Resumed(_Message):
    """A generation goes on here, from token number `seq`."""

    id: str
    seq: int


class Detached(_Message):
    """A generation goes on elsewhere, where it was resumed; this is its last frame here."""

    id: str


class Prefill(_Message):
    """How much of a long prompt is done."""

    id: str
    done: int
    total: int


class Alternative(Struct, kw_only=True, omit_defaults=True):
    """A token that could stand in a place; it has no `text` if it is no whole text by itself."""

    token_id: int
    text: str | None = None
    logprob: float


class TokenLogprob(Alternative, kw_only=True):
    """A token of the answer, with the likeliest ones for its place."""

    top: list[Alternative] = []


class Token(_Message):
    """Text of `n` tokens, the first of which is number `seq` of the answer; `logprobs` has an entry for each of them."""

    id: str
    seq: int
    n: int
    text: str
    logprobs: list[TokenLogprob] | None = None


class Usage(Struct, kw_only=True):
    """Token counts; the end token, when one was sampled, counts as completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timings(Struct, kw_only=True, omit_defaults=True):
    """Milliseconds since the request was read; what was never reached is left out."""

    total_ms: float
    queued_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    tokens_per_s: float | None = None
    cancel_ms: float | None = None


class ErrorDetail(Struct, kw_only=True, omit_defaults=True):
    """Why a generation ended with `finish_reason` "error", and if waiting may help, how long."""

    code: ErrorCode
    message: str
    retry_after_ms: int | None = None


class Done(_Message):
    """The one end of a generation."""

    id: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    error: ErrorDetail | None = None


class Error(_Message):
    """Answers a bad message, or ends a load; never ends a generation."""

    code: ErrorCode
    message: str
    id: str | None = None
    retry_after_ms: int | None = None


class ServerInfo(Struct, kw_only=True):
    """The server's part of a status."""

    version: str
    uptime_s: float
    draining: bool


class ConnectionInfo(Struct, kw_only=True):
    """The connection's part of a status."""

    session: str
    active: list[str]


class StatusReport(_Message, tag="status"):
    """The answer to a status."""

    server: ServerInfo
    models: list[dict[str, Any]]
    available: list[str]
    connection: ConnectionInfo


class Goaway(_Message):
    """The server is about to stop; what runs may finish until the deadline."""

    deadline_ms: int


ServerMessage = (
    Loading | Ready | Queued | Started | Resumed | Prefill | Token | Done | Detached | Error | StatusReport | Goaway
)

# What may stand in a field whose values are listed.
CHOICES: dict[str, tuple[str, ...]] = {
    "role": get_args(Role),
    "dtype": get_args(Dtype),
    "quantization": get_args(Quantization),
    "device": ("auto", "cpu", "cuda", "cuda:N"),
}

CLIENT_TYPES: dict[str, type[ClientMessage]] = {t.__struct_config__.tag: t for t in get_args(ClientMessage)}


class Refusal(Exception):
    """Why a client's message is refused: an error code, words that say what to do, and what is known of the message."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        id: str | None = None,
        answers_with_done: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.id = id
        # A generate whose id is valid, or left out, is answered with a done, everything else with an error.
        self.answers_with_done = answers_with_done
        self.retry_after = retry_after  # in seconds

    @property
    def retry_after_ms(self) -> int | None:
        """When to try again, as the protocol has it."""
        return None if self.retry_after is None else math.ceil(self.retry_after * 1000)


def decode(text: str, max_depth: int = 1024) -> ClientMessage:
    """Read one client message, of JSON that nests no deeper than `max_depth` levels.

    Raises:
        Refusal: `bad_json`, `unknown_type`, or `bad_message` naming the field.
    """
    fields = parse(text, max_depth)
    kind = fields.get("type") if isinstance(fields, dict) else None
    if not isinstance(kind, str):
        raise Refusal("bad_message", "$.type: send one JSON object with a type, one of " + ", ".join(CLIENT_TYPES))
    if kind not in CLIENT_TYPES:
        raise Refusal("unknown_type", "$.type: unknown; send one of " + ", ".join(CLIENT_TYPES))
    try:
        return msgspec.convert(fields, CLIENT_TYPES[kind], str_keys=True)
    except msgspec.ValidationError as error:
        id, valid = _valid_id(fields)
        raise Refusal("bad_message", _named(error), id, answers_with_done=valid and kind == "generate") from None


class _Head(msgspec.Struct):
    type: str = ""
    id: Id | None = None


_HEAD_DECODER = msgspec.json.Decoder(_Head)


def head(text: str) -> tuple[type[ClientMessage], str | None] | None:
    """Decode only the type and the id of a message, at little cost; None if they are not valid."""
    try:
        found = _HEAD_DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    return (CLIENT_TYPES[found.type], found.id) if found.type in CLIENT_TYPES else None


def parse(text: str, max_depth: int) -> Any:
    """Read JSON that nests no deeper than `max_depth` levels.

    Raises:
        Refusal: `bad_json`.
    """
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Refusal("bad_json", f"the frame is not one JSON object: {error}") from None
    if _deeper_than(max_depth, fields):
        raise Refusal("bad_json", f"the frame nests more than {max_depth} levels")
    return fields


def encode(message: ServerMessage) -> bytes:
    """Write one server message as the UTF-8 of a text frame."""
    return orjson.dumps(message, default=msgspec.to_builtins)


def schema() -> dict[str, Any]:
    """Give the JSON Schema of all messages, client's and server's."""
    (client, server), definitions = msgspec.json.schema_components(
        (ClientMessage, ServerMessage), ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": SUBPROTOCOL,
        "anyOf": [{"title": "client to server", **client}, {"title": "server to client", **server}],
        "$defs": definitions,
    }


def _deeper_than(depth: int, value: Any) -> bool:
    """Tell whether JSON nests deeper: level after level, since a recursion is what its depth could break."""
    level = [value] if isinstance(value, dict | list) else []
    while level and depth:
        depth -= 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
    return bool(level)


def _valid_id(fields: dict[str, Any]) -> tuple[str | None, bool]:
    try:
        return msgspec.convert(fields.get("id"), Id | None), True
    except msgspec.ValidationError:
        return None, False


def _named(error: msgspec.ValidationError) -> str:
    """Turn "Expected `float` - at `$.temperature`" around, the field first, and repeat nothing of what the client wrote."""
    reason, _, at = str(error).partition(" - at ")
    path = at[at.rfind("`$") :].strip("`") or "$"
    choices = CHOICES.get(path.rpartition(".")[2])
    if choices and not reason.startswith("Expected `str`, got"):
        return f"{path}: send one of {', '.join(choices)}"
    return f"{path}: {reason[:1].lower()}{reason[1:]}"
