"""Whether a client may have a model loaded that is not: the operator's rule, and how often."""

import time

from LLM.errors import Refused
from LLM.model import ModelSpec
from LLM.model_service import ModelService
from wsserver.session import Session


class SessionLoadPermission:
    """The permission of a session's client to have a model loaded."""

    def __init__(self, session: Session, models: ModelService, spec: ModelSpec) -> None:
        self._session = session
        self._models = models
        self._spec = spec

    def check(self) -> None:
        """Check what the operator allows.

        Raises:
            Refused: `forbidden` by --client-loads.
        """
        allowed = map(self._models.resolve, _may_be_loaded(self._session))
        if self._session.server.config.client_loads != "any" and self._spec not in allowed:
            why = "this server does not load that for clients, which may use what its status lists as loaded"
            raise Refused("forbidden", f"{why}; leave dtype, device and quantization out, or ask the operator", "model")

    def spend(self) -> None:
        """Check it again, and count the load that begins now.

        Raises:
            Refused: `forbidden`, or `rate_limited`.
        """
        self.check()
        if seconds := self._session.account.loads.take(time.monotonic()):
            why = f"a client may have {self._session.server.config.loads_per_minute} models loaded a minute"
            raise Refused("rate_limited", f"{why}; try again in {seconds:.0f} s, or use one that is loaded", None, seconds)


def _may_be_loaded(session: Session) -> list[str]:
    """Give the names of the models that clients may have loaded, as the server loads them itself."""
    config = session.server.config
    # One that is kept loaded comes back for whoever asks, should its engine have died.
    kept = [config.model, *config.pin]
    return kept if config.client_loads == "off" else [*kept, *config.preload, *config.allow_load]
