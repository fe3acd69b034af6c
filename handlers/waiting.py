"""Waiting for a model on behalf of an id, so that a cancel ends the wait."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from LLM.errors import Refused
from LLM.model import ModelSpec
from LLM.model_service import ModelService
from wsserver.connection import Connection
from wsserver.protocol import Init, Refusal

T = TypeVar("T")


class Stopped(Exception):
    """The id was told to stop while it waited."""


def chosen_model(init: Init, models: ModelService, id: str | None, answers_with_done: bool) -> ModelSpec:
    """Give the model that an init asks for.

    Raises:
        Refusal: there is no such model.
    """
    try:
        return models.resolve(init.model, init.dtype, init.device, init.quantization)
    except Refused as refused:
        raise Refusal(refused.reason, in_words(refused), id, answers_with_done) from None


def in_words(refused: Refused) -> str:
    """Give the message of a refusal as the protocol has it, the field's path first."""
    return f"$.{refused.field}: {refused.message}" if refused.field else refused.message


async def until_stopped(connection: Connection, id: str, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` for an open id; a stop of the id cancels the work.

    Raises:
        Stopped: the id was stopped before the work was done.
    """
    task = asyncio.create_task(work)
    connection.on_stop(id, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        # Two cancels look alike here: of the work, by a stop, and of this very task, because the client has gone.
        task.cancel()
        if connection.session.is_stopping(id) and not _being_cancelled():
            raise Stopped from None
        raise


def _being_cancelled() -> bool:
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0
