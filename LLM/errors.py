"""Why a load or a request is refused. Knows the reasons by name, not how they travel to a client."""

from typing import Literal

Reason = Literal[
    "bad_message",
    "forbidden",
    "rate_limited",
    "model_not_found",
    "load_failed",
    "context_length_exceeded",
    "overloaded",
    "unsupported",
    "internal",
]


class Refused(Exception):
    """A request that cannot be served.

    `message` says what was wrong and what to do, in words fit for any client; `field` names what of the request it is about.
    `retry_after` is in how many seconds it is worth trying again, where that is known.
    """

    def __init__(self, reason: Reason, message: str, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
        self.field = field
        self.retry_after = retry_after
