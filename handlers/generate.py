"""`generate`: from a message to a generation request, and from its parts to frames."""

import logging
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import fields, replace
from functools import partial

from handlers.loads import SessionLoadPermission
from handlers.waiting import Late, Stopped, chosen_model, refusal, until_stopped
from LLM._base_model_handler import ChatMessage, GenerationOptions
from LLM.chat.reading import Reading
from LLM.engine import request as engine
from LLM.errors import Refused
from LLM.model import Model, ModelSpec, Waiter
from LLM.model_service import ModelService
from wsserver.job import Job
from wsserver.peer import Peer
from wsserver.protocol import (
    Alternative,
    Done,
    ErrorDetail,
    Generate,
    Prefill,
    Queued,
    ServerMessage,
    Started,
    Timings,
    Token,
    TokenLogprob,
    Usage,
)
from wsserver.session import Session

log = logging.getLogger(__name__)


def generate(message: Generate, peer: Peer, models: ModelService) -> None:
    """Begin a generation with the model that this connection's last init chose."""
    spec = chosen_model(peer.session.chosen, models, message.id, answers_with_done=True)
    peer.spawn(message, partial(_serve, message, peer.session, models, spec, time.monotonic()))


async def _serve(
    message: Generate, session: Session, models: ModelService, spec: ModelSpec, read_at: float, job: Job
) -> None:
    deadline = read_at + session.server.request_timeout
    try:
        # Used from here to the end of the stream, so that it is not unloaded before the stream is open.
        async with AsyncExitStack() as use:
            prepare = _prepare(message, session, models, spec, job, use)
            model, request = await until_stopped(job, prepare, deadline - time.monotonic())
            scope = "" if session.server.config.share_prefixes else ":".join(session.owner)
            request = replace(
                request, owner=session.owner, user=_user(message, session), deadline=deadline, cache_scope=scope
            )
            request = _within_limits(request, message, session)
            await _stream(model, request, job, session, _Answer(job.id, spec.model, read_at))
    except Stopped:
        # Whatever this says, the session makes it the done of a stop.
        job.send(job.unfinished("cancelled", _ms_since(read_at)))
    except Late:
        job.send(job.unfinished("timeout", _ms_since(read_at)))
    except Refused as refused:
        job.send(refusal(job, refused, _ms_since(read_at)))


async def _prepare(
    message: Generate, session: Session, models: ModelService, spec: ModelSpec, job: Job, use: AsyncExitStack
) -> tuple[Model, engine.GenerationRequest]:
    """Wait for the model and make the prompt's tokens."""

    def on_position(position: int) -> None:
        job.send(Queued(id=job.id, position=position))

    permission, user = SessionLoadPermission(session, models, spec), _user(message, session)
    waiter = Waiter(on_position=on_position, owner=session.owner, user=user, permission=permission)
    model = await use.enter_async_context(models.use(spec, waiter))
    prompt = message.prompt if message.prompt is not None else _conversation(message)
    _log_content(session, job, "asks", prompt)
    bounds = Reading(session.server.config.max_prompt_tokens or sys.maxsize, _field(message))
    key = (session.id, job.id, job.number)
    try:
        return model, await model.request(key, prompt, _options(message), bounds, session.owner)
    finally:
        job.read(bounds.tokens)


def _user(message: Generate, session: Session) -> str | None:
    """Return which of a key's users asks. Behind one address there is no one who could vouch for a user."""
    return None if session.key is None else message.user or session.user


def _within_limits(request: engine.GenerationRequest, message: Generate, session: Session) -> engine.GenerationRequest:
    """Give a request as it may run on this server.

    Raises:
        Refused: it is longer than the operator allows.
    """
    config = session.server.config
    prompt_tokens, most = len(request.prompt_ids), config.max_prompt_tokens
    if most is not None and prompt_tokens > most:
        why = f"this server takes prompts of up to {most} tokens, and this one has {prompt_tokens}; shorten it"
        raise Refused("context_length_exceeded", why, _field(message))
    if config.max_tokens is None:
        return request
    for field, asked in (("max_tokens", message.max_tokens), ("min_tokens", message.min_tokens)):
        if asked is not None and asked > config.max_tokens:
            raise Refused("bad_message", f"is more than the {config.max_tokens} that this server allows", field)
    return replace(request, max_tokens=min(request.max_tokens, config.max_tokens))


async def _stream(model: Model, request: engine.GenerationRequest, job: Job, session: Session, answer: "_Answer") -> None:
    async with model.engine.open(request) as stream:
        job.on_stop(partial(model.engine.cancel, request.key))
        async for part in stream:
            if isinstance(part, engine.Delta):
                _log_content(session, job, "is answered", part.text)
            job.send(answer.frame(part))


def _log_content(session: Session, job: Job, what: str, content: object) -> None:
    """Log what was written, if the operator wants that: escaped, since it is a client's or a model's own."""
    if session.server.config.log_content:
        log.debug("session %s: %r %s %r", session.id, job.id, what, content)


def _field(message: Generate) -> str:
    return "prompt" if message.messages is None else "messages"


def _conversation(message: Generate) -> list[ChatMessage]:
    return [ChatMessage(role=m.role, content=m.content) for m in message.messages or ()]


def _options(message: Generate) -> GenerationOptions:
    given = {field.name: getattr(message, field.name) for field in fields(engine.Sampling)}
    return GenerationOptions(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens or 0,
        stop=(message.stop,) if isinstance(message.stop, str) else tuple(message.stop or ()),
        stop_token_ids=tuple(message.stop_token_ids or ()),
        ignore_eos=bool(message.ignore_eos),
        logprobs=message.logprobs,
        sampling={name: value for name, value in given.items() if value is not None},
    )


class _Answer:
    """Turns one generation's parts into frames: counts `seq`, and puts the waits before the engine onto the times."""

    def __init__(self, id: str, model: str, read_at: float) -> None:
        self.id = id
        self._model = model
        self._seq = 0
        self._seconds_before = time.monotonic() - read_at

    def frame(self, part: engine.Part) -> ServerMessage:
        match part:
            case engine.Queued(position):
                return Queued(id=self.id, position=position)
            case engine.Started(prompt_tokens, cached_tokens):
                return Started(id=self.id, model=self._model, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
            case engine.Prefill(done, total):
                return Prefill(id=self.id, done=done, total=total)
            case engine.Delta(text, n, logprobs):
                self._seq += n
                told = [_logprob(*scored) for scored in logprobs] or None
                return Token(id=self.id, seq=self._seq - n, n=n, text=text, logprobs=told)
            case engine.Finished():
                return self._done(part)

    def _done(self, end: engine.Finished) -> Done:
        usage = Usage(
            prompt_tokens=end.prompt_tokens, completion_tokens=end.completion_tokens, cached_tokens=end.cached_tokens
        )
        retry_after_ms = None if end.retry_after is None else round(end.retry_after * 1000)
        error = ErrorDetail(code=end.error[0], message=end.error[1], retry_after_ms=retry_after_ms) if end.error else None
        return Done(id=self.id, finish_reason=end.reason, usage=usage, timings=self._timings(end), error=error)

    def _timings(self, end: engine.Finished) -> Timings:
        times, before = end.timings, self._seconds_before
        timings = Timings(total_ms=_ms(before + times.total))
        if times.started is not None:
            timings.queued_ms = _ms(before + times.started)
        if times.started is not None and times.first_token is not None:
            timings.prefill_ms = _ms(times.first_token - times.started)
            timings.ttft_ms = _ms(before + times.first_token)
            decode = times.total - times.first_token
            if end.completion_tokens > 1 and decode > 0:
                timings.tokens_per_s = round((end.completion_tokens - 1) / decode, 2)
        return timings


def _logprob(token: engine.Scored, *top: engine.Scored) -> TokenLogprob:
    return TokenLogprob(**token._asdict(), top=[Alternative(**other._asdict()) for other in top])


def _ms_since(then: float) -> float:
    return _ms(time.monotonic() - then)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
