"""`init`: choose this connection's model, and load it where needed."""

from contextlib import AsyncExitStack
from functools import partial

from handlers.waiting import Stopped, chosen_model, in_words, until_stopped
from LLM.errors import Refused
from LLM.model import Model, ModelSpec, Waiter
from LLM.model_service import ModelService
from wsserver import __version__, protocol
from wsserver.connection import Connection
from wsserver.protocol import Init, Limits, Loading, ModelInfo, Ready


def init(message: Init, connection: Connection, models: ModelService) -> None:
    """Begin to load the model the message asks for; `ready` comes when it is there."""
    spec = chosen_model(message, models, message.id, answers_with_done=False)
    connection.spawn(message, partial(_load, connection, models, spec))


async def _load(connection: Connection, models: ModelService, spec: ModelSpec, id: str) -> None:
    def on_progress(stage: str, progress: float) -> None:
        connection.send(Loading(id=id, model=spec.model, stage=stage, progress=round(progress, 3)))

    try:
        async with AsyncExitStack() as use:
            in_use = use.enter_async_context(models.use(spec, Waiter(on_progress)))
            connection.send(_ready(id, connection, await until_stopped(connection, id, in_use)))
    except Stopped:
        connection.send(connection.session.failure(id, "cancelled", "the load was cancelled"))
    except Refused as refused:
        connection.send(connection.session.failure(id, refused.reason, in_words(refused)))


def _ready(id: str, connection: Connection, model: Model) -> Ready:
    session = connection.session
    limits = Limits(max_message_bytes=protocol.MAX_MESSAGE_BYTES, max_active=session.server.max_active)
    return Ready(
        id=id,
        protocol=protocol.VERSION,
        server=__version__,
        session=session.id,
        model=ModelInfo(**model.describe()),
        limits=limits,
    )
