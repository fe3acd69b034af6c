"""The resumable jobs of a server, by their tokens, for as long as somebody may come back for them.

Bounded in time and in bytes, which clients share. Knows no connections and no models.
"""

import asyncio
import logging
import secrets
from collections.abc import Iterator

from wsserver.job import Job
from wsserver.protocol import Refusal, Resume
from wsserver.sessions.shares import Shares

log = logging.getLogger(__name__)

EXPIRED = "there is nothing to resume under this id and token; it ended too long ago, or never was: send generate anew"
WARNING_INTERVAL = 60.0  # seconds between two warnings that there is too little room


class Resumables:
    """Keeps jobs `window` seconds after the last one who listened has left, or after their end."""

    def __init__(self, window: float = 120.0, max_bytes: int = 64 << 20, max_unheard_tokens: int = 2048) -> None:
        self.max_unheard_tokens = max_unheard_tokens
        self._window = window
        self._max_bytes = max_bytes
        self._jobs: dict[str, Job] = {}
        self._tokens: dict[Job, str] = {}
        self._shares: Shares[Job] = Shares()
        self._expiries: dict[Job, asyncio.TimerHandle] = {}
        self._warned_at: float | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    @property
    def size(self) -> int:
        """The bytes of all transcripts."""
        return self._shares.size

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
        self._shares.add(job, job.owner, job.size, _rank(job))
        self._make_room()
        return token

    def grew(self, job: Job, by: int) -> None:
        """Count bytes that a kept transcript takes; over the bound the client that has most loses what it misses least."""
        self._shares.grow(job, by)
        self._make_room()

    def moved(self, job: Job) -> None:
        """Look again at how likely a kept job is to be missed."""
        self._shares.move(job, _rank(job))
        self._make_room()

    def let_go(self, job: Job) -> None:
        """Let a job's time run from now."""
        if job in self._expiries:
            self._expiries[job].cancel()
        self._expiries[job] = asyncio.get_running_loop().call_later(self._window, self._expire, job)
        self.moved(job)

    def forget(self, job: Job) -> None:
        """Keep a job no longer; one that nobody listens to ends."""
        self._shares.remove(job)
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

    def _make_room(self) -> None:
        while self._shares.size > self._max_bytes and (job := self._shares.first(self._max_bytes)):
            self._warn()
            self.forget(job)

    def _warn(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._warned_at is None or now - self._warned_at >= WARNING_INTERVAL:
            self._warned_at = now
            log.warning("forgetting resumable generations: all of them take more than %d bytes", self._max_bytes)


def _rank(job: Job) -> int | None:
    """Give when a job is forgotten: after its end first, then without a listener; not while somebody reads its past."""
    if job.needs_transcript:
        return None
    return 0 if job.ended else 1 if job.listener is None else 2
