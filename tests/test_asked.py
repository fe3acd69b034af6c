"""What a client makes of frames and of lost connections, against a server that is told nothing but what the client says."""

from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wsserver.client.asked import Asked, Generation, Load
from wsserver.client.messages import ConnectionLost, Frame, ServerError, decode

TEXT = "abcdefghijklmnopqrstuvwxyz"
ENDING = {
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0},
    "timings": {"total_ms": 1.0},
}


def frame(kind: str, **fields: Any) -> Frame:
    read = decode(orjson.dumps({"type": kind, "id": "g1", **fields}))
    assert read
    return read


def started(**fields: Any) -> Frame:
    return frame("started", model="m", prompt_tokens=1, cached_tokens=0, **fields)


def token(seq: int, n: int = 1) -> Frame:
    return frame("token", seq=seq, n=n, text=TEXT[seq : seq + n])


def done(reason: str = "stop", **fields: Any) -> Frame:
    return frame("done", finish_reason=reason, **ENDING, **fields)


def generation(resumable: bool = True, **parameters: Any) -> Generation:
    return Generation("g1", None, "hi", resumable, parameters)  # type: ignore[arg-type]


def said(messages: Iterable[bytes]) -> list[dict[str, Any]]:
    return [orjson.loads(message) for message in messages]


def hears(asked: Asked, *frames: Frame) -> list[str]:
    """Give the types of what it says to some frames."""
    return [message["type"] for frame in frames for message in said(asked.receive(frame))]


# One generation.


def test_a_generate_says_what_was_given_and_leaves_the_rest_to_the_server():
    asked = Generation("g1", [{"role": "user", "content": "hi"}], None, True, {"temperature": 0, "stop": ["x"]})
    assert said(asked.opening()) == [
        {
            "type": "generate",
            "id": "g1",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0,
            "stop": ["x"],
            "resumable": True,
        }
    ]


def test_what_json_has_no_form_for_is_refused_where_it_is_said():
    with pytest.raises(TypeError):
        generation(logit_bias=object())


def test_text_that_nobody_has_read_is_joined():
    asked = generation()
    hears(asked, started(), token(0), token(1, 2))
    assert asked.unread
    assert (asked.take(), asked.take(), asked.tokens) == ("abc", "", 3)
    asked.progress.clear()
    assert not asked.unread


def test_a_second_cancel_says_nothing_and_neither_does_one_after_the_end():
    asked = generation()
    assert said(asked.cancel()) == [{"type": "cancel", "id": "g1"}]
    assert asked.cancel() == []
    ended = generation()
    hears(ended, done())
    assert ended.cancel() == []


def test_one_that_is_not_resumable_is_lost_with_its_connection_once_it_has_started():
    asked = generation(resumable=False)
    hears(asked, frame("queued", position=1))
    assert [message["type"] for message in said(asked.opening())] == ["generate"]
    hears(asked, started(), token(0))
    assert asked.opening() == []
    assert isinstance(asked.error, ConnectionLost)
    assert asked.take() == "a"


def test_an_error_frame_does_not_end_a_generation_that_runs():
    asked = generation()
    hears(asked, started(resume_token="t"), frame("error", code="not_active", message=""), token(0))
    hears(asked, frame("error", code="rate_limited", message=""))
    assert not asked.ended


def test_a_refused_resume_ends_it_where_text_was_read_and_begins_it_anew_where_none_was():
    for heard, expected in ((token(0),), []), ((), ["generate"]):
        asked = generation()
        hears(asked, started(resume_token="t"), *heard)
        assert [message["type"] for message in said(asked.opening())] == ["resume"]
        assert hears(asked, frame("error", code="resume_expired", message="too late")) == expected
        assert isinstance(asked.error, ServerError) == bool(heard)
    asked = generation()
    hears(asked, started(resume_token="t"))
    asked.opening()
    assert hears(asked, frame("error", code="overloaded", message="", retry_after_ms=1500)) == []
    assert isinstance(asked.error, ServerError)
    assert asked.error.retry_after == 1.5


def test_one_that_another_connection_took_up_has_ended_here():
    asked = generation()
    hears(asked, started(resume_token="t"), frame("detached"))
    assert isinstance(asked.error, ServerError)
    assert asked.error.code == "detached"


def test_an_answer_that_was_not_streamed_comes_with_its_end():
    asked = generation(stream=False)
    hears(asked, started(), done(text="all of it"))
    assert (asked.take(), asked.ended) == ("all of it", True)


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled", "timeout", "shutdown", "what a later server says"])
def test_only_an_error_is_one(reason: str):
    asked = generation()
    hears(asked, done(reason))
    assert asked.done
    assert (asked.error, asked.done.finish_reason) == (None, reason)
    hears(failed := generation(), done("error", error={"code": "of a later server", "message": "so"}))
    assert str(failed.error) == "of a later server: so"


# A load.


def test_a_load_is_said_anew_until_it_is_ready_and_by_each_new_connection_after_that():
    load = Load("g1", model="m", dtype=None)
    assert said(load.opening()) == [{"type": "init", "id": "g1", "model": "m"}]
    hears(load, frame("loading", model="m", stage="weights", progress=0.5))
    assert (len(load.progress), load.ended) == (1, False)
    model = {"id": "m", "context_length": 1, "dtype": "", "quantization": "", "device": ""}
    limits = {"max_message_bytes": 1, "max_active": 1}
    hears(load, frame("ready", protocol=1, server="", session="", model=model, limits=limits))
    assert load.outcome().model.id == "m"
    assert said(load.opening()) == [{"type": "init", "id": "g1", "model": "m"}]


def test_a_load_that_fails_says_why():
    load = Load("g1")
    hears(load, frame("error", code="not_active", message=""))
    assert not load.ended
    hears(load, frame("error", code="load_failed", message="broken"))
    with pytest.raises(ServerError, match="load_failed: broken"):
        load.outcome()


# Any generation, over any connections.


class Far:
    """The server's side of one generation: what it keeps, and what is on its way to the client."""

    def __init__(self, resumable: bool) -> None:
        self.resumable = resumable
        self.sent: list[Frame] = []
        self.forget()

    def forget(self) -> None:
        """Be another server, which knows nothing."""
        self.made = 0
        self.started = self.active = self.heard = False
        self.end: str | None = None
        self.sent.clear()

    def hear(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "generate":
                assert not (self.active and self.heard), "a second generate under one id"
                self.forget()
                self.active = self.heard = True
            case "resume" if self.started and self.resumable:
                assert message["after_seq"] <= self.made
                self.heard = True
                self.sent.append(frame("resumed", seq=message["after_seq"]))
                self.tell(message["after_seq"])
            case "resume":
                self.sent.append(frame("error", code="resume_expired", message=""))
            case "cancel" if self.active or (self.end and self.heard):
                self.active, self.end = False, "cancelled"
                if self.heard:
                    self.sent = [f for f in self.sent if type(f).__name__ not in ("Token", "Done")]
                    self.tell(self.made)
            case "cancel":
                self.sent.append(frame("error", code="not_active", message=""))

    def tell(self, seq: int) -> None:
        if seq < self.made and self.end != "cancelled":
            self.sent.append(token(seq, self.made - seq))
        if self.end:
            self.sent.append(done(self.end))
            self.heard = False

    def go_on(self, tokens: int) -> None:
        if not self.active:
            return
        if not self.started:
            self.started = True
            self.sent.append(started(resume_token="t") if self.resumable else started())
        before, self.made = self.made, min(self.made + tokens, len(TEXT))
        if self.made == len(TEXT):
            self.active, self.end = False, "stop"
        if self.heard:
            self.tell(before)

    def lose(self) -> None:
        self.heard = False
        self.sent.clear()
        if not (self.started and self.resumable):
            self.active = False


class AnyConnections(RuleBasedStateMachine):
    """Frames come or are lost, connections too; the client reads what it reads."""

    @initialize(resumable=st.booleans())
    def ask(self, resumable: bool) -> None:
        self.asked = generation(resumable)
        self.far = Far(resumable)
        self.read = ""
        self.cancelled = self.restarted = self.lost = False
        self.say(self.asked.opening())

    def say(self, messages: list[bytes]) -> None:
        for message in said(messages):
            self.far.hear(message)

    @rule(tokens=st.integers(1, 9))
    def make(self, tokens: int) -> None:
        self.far.go_on(tokens)

    @rule(frames=st.integers(1, 3))
    def deliver(self, frames: int) -> None:
        for _ in range(frames):
            if self.far.sent and not self.asked.ended:
                self.say(self.asked.receive(self.far.sent.pop(0)))

    @rule(restarts=st.booleans(), meanwhile=st.integers(0, 9))
    def lose(self, restarts: bool, meanwhile: int) -> None:
        if self.asked.ended:
            return
        self.far.lose()
        self.lost = True
        if restarts:
            self.far.forget()
            self.restarted = True
        elif meanwhile:
            self.far.go_on(meanwhile)
        self.say(self.asked.opening())

    @precondition(lambda self: not self.cancelled)
    @rule()
    def cancel(self) -> None:
        self.cancelled = True
        self.say(self.asked.cancel())

    @rule()
    def take(self) -> None:
        self.read += self.asked.take()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert TEXT.startswith(self.read)

    def teardown(self) -> None:
        if not hasattr(self, "asked"):
            return
        for _ in range(2 * len(TEXT)):
            self.deliver(3)
            self.make(1)
        self.take()
        assert self.asked.ended
        if self.asked.done and self.asked.done.finish_reason == "stop":
            assert self.read == TEXT
        elif self.asked.done:
            assert self.cancelled
        else:
            assert isinstance(self.asked.error, ServerError if self.far.resumable else ConnectionLost)
            assert self.lost
            assert self.restarted or not self.far.resumable


AnyConnections.TestCase.settings = settings(max_examples=100, deadline=None)
TestAnyConnections = AnyConnections.TestCase
