"""`resume`: take up a resumable generation that another connection began; `resumed` and what came since are the answer."""

from LLM.model_service import ModelService
from wsserver.peer import Peer
from wsserver.protocol import Resume


def resume(message: Resume, peer: Peer, models: ModelService) -> None:
    """Let this connection hear the generation that the message names."""
    peer.resume(message)
