"""`cancel`: stop one generation or load of this connection, or all; the done or error of each is the answer."""

import time

from LLM.model_service import ModelService
from wsserver.peer import Peer
from wsserver.protocol import Cancel


def cancel(message: Cancel, peer: Peer, models: ModelService) -> None:
    """Stop what the message names."""
    now = time.monotonic()
    peer.stop(peer.session.cancel(message, now), "cancelled", now)
