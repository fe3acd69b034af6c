"""The resumable jobs of a server, by their tokens, for as long as somebody may come back for them.

Bounded in time and in bytes. Knows no connections and no models.
"""

import asyncio
import logging
import secrets
from collections.abc import Iterator

from wsserver.job import Job
from wsserver.protocol import Refusal, Resume

log = logging.getLogger(__name__)

EXPIRED = "there is nothing to resume under this id and token; it ended too long ago, or never was: send generate anew"


class Resumables:
    """Keeps jobs `window` seconds after the last one who listened has left, or after their end."""

    def __init__(self, window: float = 120.0, max_bytes: int = 64 << 20, max_unheard_tokens: int = 2048) -> None:
        self.max_unheard_tokens = max_unheard_tokens
        self.size = 0  # bytes of all transcripts
        self._window = window
        self._max_bytes = max_bytes
        self._jobs: dict[str, Job] = {}
        self._tokens: dict[Job, str] = {}
        self._expiries: dict[Job, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def find(self, message: Resume, key: str | None) -> Job:
        """Give the job that a client means, who has shown this key.

        Raises:
            Refusal: `resume_expired`, in the same words whether the token, the id or the key is wrong, or all came too late.
        """
        job = self._jobs.get(message.resume_token)
        if job is None or job.id != message.id or job.key != key:
            raise Refusal("resume_expired", EXPIRED, message.id)
        return job

    # For jobs.

    def keep(self, job: Job) -> str:
        """Keep a job from now on; give the token that finds it."""
        token = secrets.token_urlsafe(24)
        self._jobs[token], self._tokens[job] = job, token
        self.grew(job.size)
        return token

    def grew(self, by: int) -> None:
        """Count bytes that a kept transcript takes; over the bound the ones that are least likely to be missed go."""
        self.size += by
        while self.size > self._max_bytes and (least := self._least()):
            log.warning("forgetting a resumable generation: all of them take more than %d bytes", self._max_bytes)
            self.forget(least)

    def let_go(self, job: Job) -> None:
        """Let a job's time run from now."""
        if job in self._expiries:
            self._expiries[job].cancel()
        self._expiries[job] = asyncio.get_running_loop().call_later(self._window, self._expire, job)

    def forget(self, job: Job) -> None:
        """Keep a job no longer; one that nobody listens to ends."""
        self.size -= job.size
        del self._jobs[self._tokens.pop(job)]
        if expiry := self._expiries.pop(job, None):
            expiry.cancel()
        job.forget()

    async def close(self) -> None:
        """Forget all, and wait for those to end that nobody listens to."""
        unheard = [job.task for job in self._tokens if job.listener is None]
        for job in list(self._tokens):
            self.forget(job)
        if unheard:
            await asyncio.wait(unheard)

    def _expire(self, job: Job) -> None:
        del self._expiries[job]
        if job.listener is None:  # else its time runs from when that one leaves
            self.forget(job)

    def _least(self) -> Job | None:
        """Give the job to be forgotten first: one that has ended, else one that nobody hears; the oldest of its kind."""
        jobs = [job for job in self._tokens if not job.needs_transcript]
        return min(jobs, key=lambda job: (not job.ended, job.listener is not None), default=None)
