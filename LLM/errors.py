"""Why a load or a request is refused. Knows the reasons by name, not how they travel to a client."""

from typing import Literal

Reason = Literal[
    "bad_message", "model_not_found", "load_failed", "context_length_exceeded", "overloaded", "unsupported", "internal"
]


class Refused(Exception):
    """A request that cannot be served.

    `message` says what was wrong and what to do, in words fit for any client; `field` names what of the request it is about.
    """

    def __init__(self, reason: Reason, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
        self.field = field
