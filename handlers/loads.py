"""Whether a client may have a model loaded that is not: the operator's rule, and how often."""

import time

from LLM.errors import Refused
from LLM.model import ModelSpec
from LLM.model_service import ModelService
from wsserver.session import Session


def may_load(session: Session, models: ModelService, spec: ModelSpec) -> None:
    """Let a load begin for a client, and count it.

    Raises:
        Refused: `forbidden` by --client-loads, or `rate_limited`.
    """
    config = session.server.config
    if config.client_loads != "any" and spec not in map(models.resolve, _may_be_loaded(session)):
        why = "this server does not load that for clients, which may use what its status lists as loaded"
        raise Refused("forbidden", f"{why}; leave dtype, device and quantization out, or ask the operator", "model")
    if seconds := session.account.loads.take(time.monotonic()):
        why = f"a client may have {config.loads_per_minute} models loaded a minute"
        raise Refused("rate_limited", f"{why}; try again in {seconds:.0f} s, or use one that is loaded", None, seconds)


def _may_be_loaded(session: Session) -> list[str]:
    """Give the names of the models that clients may have loaded, as the server loads them itself."""
    config = session.server.config
    # One that is kept loaded comes back for whoever asks, should its engine have died.
    kept = [config.model, *config.pin]
    return kept if config.client_loads == "off" else [*kept, *config.preload, *config.allow_load]
