"""One message handler per client message: each translates between the protocol and the models, and never waits."""

from collections.abc import Callable
from typing import Any

from handlers.cancel import cancel
from handlers.generate import generate
from handlers.init import init
from handlers.resume import resume
from handlers.status import status
from LLM.model_service import ModelService
from wsserver.peer import Dispatch, Peer
from wsserver.protocol import Cancel, ClientMessage, Generate, Init, Resume, Status

HANDLERS: dict[type[ClientMessage], Callable[[Any, Peer, ModelService], None]] = {
    Init: init,
    Generate: generate,
    Cancel: cancel,
    Resume: resume,
    Status: status,
}


def dispatcher(models: ModelService) -> Dispatch:
    """Give the function that hands each client message to its handler."""

    def dispatch(message: ClientMessage, peer: Peer) -> None:
        HANDLERS[type(message)](message, peer, models)

    return dispatch
