"""`cancel`: stop one generation or load of this connection, or all; the done or error of each is the answer."""

import time

from LLM.model_service import ModelService
from wsserver.connection import Connection
from wsserver.protocol import Cancel


def cancel(message: Cancel, connection: Connection, models: ModelService) -> None:
    """Stop what the message names."""
    connection.stop(connection.session.cancel(message, time.monotonic()))
