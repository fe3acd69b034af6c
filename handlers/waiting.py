"""Waiting for a model on behalf of a job, so that a stop of the job ends the wait."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from LLM.errors import Refused
from LLM.model import ModelSpec
from LLM.model_service import ModelService
from wsserver.job import Job
from wsserver.protocol import Init, Refusal, ServerMessage

T = TypeVar("T")


class Stopped(Exception):
    """The job was told to stop while it waited."""


class Late(Exception):
    """The job has waited as long as it may."""


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


def refusal(job: Job, refused: Refused, total_ms: float = 0.0) -> ServerMessage:
    """Give the frame that ends a job which a model refused."""
    return job.unfinished("error", total_ms, (refused.reason, in_words(refused)), refused.retry_after)


async def until_stopped(job: Job, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """Do `work` for a job; a stop of the job cancels the work, and so does the end of its time.

    Raises:
        Stopped: the job was stopped before the work was done.
        Late: the work was not done in so many seconds.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await _until_stopped(job, asyncio.create_task(work))
    except TimeoutError:
        if limit.expired():
            raise Late from None
        raise


async def _until_stopped(job: Job, task: asyncio.Task[T]) -> T:
    job.on_stop(task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        # Two cancels look alike here: of the work, by a stop, and of this very task, late or listened to by nobody.
        task.cancel()
        if job.stopping and not _being_cancelled():
            raise Stopped from None
        raise


def _being_cancelled() -> bool:
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0
