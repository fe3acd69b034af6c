"""One message from the broker, read as far as is needed to answer it: where to, with what, and whose it is.

Pure. MQTT 5 has properties for all of that; what a client of MQTT 3.1.1 cannot say there stands in the payload.
"""

from dataclasses import dataclass
from typing import Any

from wsserver import protocol
from wsserver.protocol import Refusal
from wsserver_mqtt.messages import Arrived
from wsserver_mqtt.topics import Topics

CANCEL_ALL = '{"type":"cancel"}'
CANCELS_ONLY = "$.type: this topic is for cancels"


class Unanswerable(Exception):
    """Why a message gets no answer, in words for the log: nothing says where one may go."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message of a client's, still to be decoded: `text` is None if the payload is no text of a length that is taken."""

    reply: str
    user: str
    token: str | None
    text: str | None
    correlation: bytes | None
    expires_in: float | None
    only_cancels: bool = False


def read(arrived: Arrived, topics: Topics, max_bytes: int, max_depth: int) -> Incoming:
    """Say where a message's answer goes, and what it says.

    Raises:
        Unanswerable: no topic for the answer is named, or one where none may go.
    """
    user = topics.user(arrived.topic)
    if user is None:
        raise Unanswerable("its topic is no user's")
    text, fields = _text(arrived.payload, max_bytes), {}
    only_cancels = topics.takes_only_cancels(arrived.topic)
    if text == "" and only_cancels:
        text = CANCEL_ALL
    reply, token = arrived.response_topic, arrived.user_properties.get("token")
    if text is not None and (reply is None or token is None):
        fields = _fields(text, max_depth)
        reply, token = reply or _string(fields.get("reply_to")), token or _string(fields.get("token"))
    if reply is None:
        raise Unanswerable("it has no Response Topic and no reply_to")
    if not topics.allows(reply, user):
        raise Unanswerable(f"answers may not go to {reply[:200]!a}")
    return Incoming(reply, user, token, text, arrived.correlation, arrived.expires_in, only_cancels)


def _text(payload: bytes, max_bytes: int) -> str | None:
    if len(payload) > max_bytes:
        return None
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None


def _fields(text: str, max_depth: int) -> dict[str, Any]:
    try:
        fields = protocol.parse(text, max_depth)
    except Refusal:
        return {}  # who reads the message itself says what is wrong, if there is somebody to say it to
    return fields if isinstance(fields, dict) else {}


def _string(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
