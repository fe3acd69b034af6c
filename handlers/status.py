"""`status`: what the server, its models and this connection are doing, answered at once."""

import time
from typing import Any

from LLM.model_service import ModelService
from wsserver import __version__
from wsserver.peer import Peer
from wsserver.protocol import ServerInfo, Status, StatusReport
from wsserver.session import ServerState


def status(message: Status, peer: Peer, models: ModelService) -> None:
    """Answer with a status report."""
    peer.reply(StatusReport(**overview(peer.session.server, models), connection=peer.session.info()))


def overview(state: ServerState, models: ModelService) -> dict[str, Any]:
    """Give what a report says to every client alike."""
    uptime = round(time.monotonic() - state.started_at, 3)
    return {
        "server": ServerInfo(version=__version__, uptime_s=uptime, draining=state.draining),
        "models": models.status(),
        "available": sorted(models.listing),
    }
