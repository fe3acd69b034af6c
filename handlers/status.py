"""`status`: what the server, its models and this connection are doing, answered at once."""

import time

from LLM.model_service import ModelService
from wsserver import __version__
from wsserver.peer import Peer
from wsserver.protocol import ServerInfo, Status, StatusReport


def status(message: Status, peer: Peer, models: ModelService) -> None:
    """Answer with a status report."""
    state = peer.session.server
    peer.reply(
        StatusReport(
            server=ServerInfo(
                version=__version__,
                uptime_s=round(time.monotonic() - state.started_at, 3),
                draining=state.draining,
            ),
            models=models.status(),
            available=sorted(models.listing),
            connection=peer.session.info(),
        )
    )
