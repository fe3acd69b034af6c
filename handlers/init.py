"""`init`: choose this connection's model, and load it where needed."""

from contextlib import AsyncExitStack
from functools import partial

from handlers.loads import SessionLoadPermission
from handlers.waiting import Stopped, chosen_model, refusal, until_stopped
from LLM.errors import Refused
from LLM.model import Model, ModelSpec, Waiter
from LLM.model_service import ModelService
from wsserver import __version__, protocol
from wsserver.job import Job
from wsserver.peer import Peer
from wsserver.protocol import Init, Limits, Loading, ModelInfo, Ready
from wsserver.session import Session


def init(message: Init, peer: Peer, models: ModelService) -> None:
    """Begin to load the model the message asks for; `ready` comes when it is there."""
    spec = chosen_model(message, models, message.id, answers_with_done=False)
    peer.spawn(message, partial(_load, peer.session, models, spec))


async def _load(session: Session, models: ModelService, spec: ModelSpec, job: Job) -> None:
    def on_progress(stage: str, progress: float) -> None:
        job.send(Loading(id=job.id, model=spec.model, stage=stage, progress=round(progress, 3)))

    try:
        async with AsyncExitStack() as use:
            waiter = Waiter(on_progress, owner=session.owner, permission=SessionLoadPermission(session, models, spec))
            in_use = use.enter_async_context(models.use(spec, waiter))
            job.send(_ready(job.id, session, await until_stopped(job, in_use)))
    except Stopped:
        job.send(job.unfinished("error", 0.0, ("cancelled", "the load was cancelled")))
    except Refused as refused:
        job.send(refusal(job, refused))


def _ready(id: str, session: Session, model: Model) -> Ready:
    config = session.server.config
    limits = Limits(
        max_message_bytes=int(config.max_message_bytes),  # its own type is no JSON
        max_active=session.server.max_active,
        max_prompt_tokens=config.max_prompt_tokens,
        max_tokens=config.max_tokens,
    )
    return Ready(
        id=id,
        protocol=protocol.VERSION,
        server=__version__,
        session=session.id,
        model=ModelInfo(**model.describe()),
        limits=limits,
    )
