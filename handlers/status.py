"""`status`: what the server, its models and this connection are doing, answered at once."""

import time

from LLM.model_service import ModelService
from wsserver import __version__
from wsserver.connection import Connection
from wsserver.protocol import ServerInfo, Status, StatusReport


def status(message: Status, connection: Connection, models: ModelService) -> None:
    """Answer with a status report."""
    state = connection.session.server
    connection.reply(
        StatusReport(
            server=ServerInfo(
                version=__version__,
                uptime_s=round(time.monotonic() - state.started_at, 3),
                draining=state.draining,
            ),
            models=models.status(),
            available=sorted(models.listing),
            connection=connection.session.info(),
        )
    )
