"""What is exchanged with a broker, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Arrived:
    """What the broker delivered; all but topic and payload are properties of MQTT 5."""

    topic: str
    payload: bytes
    response_topic: str | None = None
    correlation: bytes | None = None
    expires_in: float | None = None  # seconds
    user_properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What is to be published; `token` is the user property of that name."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None
    token: str | None = None
