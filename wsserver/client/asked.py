"""What a client has asked for and still waits for: what each frame does to it, and what to say of it on a new connection.

Pure: no sockets, tasks or timers.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from wsserver.client.messages import (
    ConnectionLost,
    Done,
    Failure,
    Frame,
    Parameters,
    Progress,
    ServerError,
    encode,
)
from wsserver.protocol import Detached, Loading, Prefill, Queued, Ready, Resumed, Started, Token, TokenLogprob


class Asked(ABC):
    """One message that opened an id. It ends once: with an `error`, or with what a subclass waits for."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.id: str = fields["id"]
        self.place = 0  # in the order of asking
        self.progress: deque[Progress] = deque()  # that nobody has read yet
        self.error: Exception | None = None
        self._message = encode(fields)
        self._cancelled = False

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether nothing more will come."""

    @property
    def unread(self) -> bool:
        """Whether there is something to be read."""
        return bool(self.progress)

    @abstractmethod
    def receive(self, frame: Frame) -> list[bytes]:
        """Take a frame that names its id; give what to say to that."""

    def opening(self) -> list[bytes]:
        """Give what to say of it on a new connection."""
        return [self._message, *self._cancel()]

    def cancel(self) -> list[bytes]:
        """Want no more of it; give what to say."""
        if self.ended or self._cancelled:
            return []
        self._cancelled = True
        return self._cancel()

    def fail(self, error: Exception) -> None:
        """End it without an answer, unless it has ended."""
        if not self.ended:
            self.error = error

    def _cancel(self) -> list[bytes]:
        return [encode({"type": "cancel", "id": self.id})] if self._cancelled else []


class Load(Asked):
    """An init, until the model is ready."""

    def __init__(self, id: str, **fields: str | None) -> None:
        super().__init__({"type": "init", "id": id, **_given(fields)})
        self.ready: Ready | None = None

    @property
    def ended(self) -> bool:
        """Whether it is ready, or failed."""
        return self.ready is not None or self.error is not None

    def receive(self, frame: Frame) -> list[bytes]:
        """Take a frame that names its id; give what to say to that."""
        match frame:
            case Loading():
                self.progress.append(frame)
            case Ready():
                self.ready = frame
            case Failure() if frame.code != "not_active":
                self.fail(frame.as_error())
        return []

    def outcome(self) -> Ready:
        """Give how it ended.

        Raises:
            ServerError, ConnectionLost: why it failed.
        """
        if self.ready:
            return self.ready
        raise self.error or RuntimeError("it has not ended")


class Generation(Asked):
    """A generate, until its done. If it is resumable, a new connection goes on where the last one was lost."""

    def __init__(
        self,
        id: str,
        messages: Sequence[Mapping[str, str]] | None,
        prompt: str | None,
        resumable: bool,
        parameters: Parameters,
    ) -> None:
        said = {"messages": messages and [dict(message) for message in messages], "prompt": prompt, **parameters}
        super().__init__({"type": "generate", "id": id, "resumable": resumable, **_given(said)})
        self.load: Load | None = None  # which chose its model
        self.started = False
        self.tokens = 0  # that were received: the next frame's `seq`
        self._pieces: list[str] = []  # of text that nobody has read yet
        self.logprobs: list[TokenLogprob] = []
        self.done: Done | None = None
        self._resume_token: str | None = None
        self._resuming = False

    @property
    def ended(self) -> bool:
        """Whether its done was received, or it was lost."""
        return self.done is not None or self.error is not None

    @property
    def unread(self) -> bool:
        """Whether there is something to be read."""
        return bool(self.progress or self._pieces)

    def take(self) -> str:
        """Give the text that nobody has read yet."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def receive(self, frame: Frame) -> list[bytes]:
        """Take a frame that names its id; give what to say to that."""
        match frame:
            case Queued() | Prefill():
                self.progress.append(frame)
            case Started():
                self.started, self._resume_token = True, frame.resume_token
                self.progress.append(frame)
            case Resumed():
                self._resuming = False
            case Token():
                self.tokens = frame.seq + frame.n
                self._add(frame.text, frame.logprobs)
            case Detached():
                self.fail(ServerError("detached", "another connection has taken this answer up"))
            case Done():
                self._end(frame)
            case Failure() if self._resuming and frame.code != "not_active":
                return self._cannot_be_resumed(frame)
        return []

    def opening(self) -> list[bytes]:
        """Give what to say of it on a new connection; nothing of one that the last one took with it."""
        if not self.started and self.load and self.load.error:
            self.fail(self.load.error)  # the server may have told that, or gone on to wait for that model
            return []
        if not self.started:
            return super().opening()
        if self._resume_token is None:
            self.fail(ConnectionLost("the connection was lost in the middle of an answer that is not resumable"))
            return []
        self._resuming = True
        resume = {"type": "resume", "id": self.id, "resume_token": self._resume_token, "after_seq": self.tokens}
        return [encode(resume), *self._cancel()]

    def _cannot_be_resumed(self, failure: Failure) -> list[bytes]:
        self._resuming = False
        if failure.code != "resume_expired" or self.tokens:
            self.fail(failure.as_error())
            return []
        # Nothing of it was told to anybody, so it may as well be another one.
        self.started, self._resume_token = False, None
        return self.opening()

    def _end(self, done: Done) -> None:
        self._add(done.text or "", done.logprobs)
        self.done = done
        if done.finish_reason == "error":
            reason = done.error
            self.error = reason.as_error() if reason else ServerError("internal", "the server does not say why")

    def _add(self, text: str, logprobs: list[TokenLogprob] | None) -> None:
        if text:
            self._pieces.append(text)
        self.logprobs += logprobs or []


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
