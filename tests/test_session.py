import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from wsserver.config import Config
from wsserver.limits import Owner
from wsserver.protocol import (
    Cancel,
    ClientMessage,
    ConnectionInfo,
    Detached,
    Done,
    Error,
    ErrorDetail,
    Generate,
    Goaway,
    Init,
    Limits,
    Loading,
    ModelInfo,
    Prefill,
    Queued,
    Ready,
    Refusal,
    Resume,
    Resumed,
    ServerInfo,
    ServerMessage,
    Started,
    Status,
    StatusReport,
    Timings,
    Token,
    Usage,
)
from wsserver.session import IllegalFrame, ServerState, Session, TooManyBadMessages, TooManyMessages, WrongKey

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=0)


def done(id: str, reason: Any = "stop", **fields: Any) -> Done:
    return Done(id=id, finish_reason=reason, usage=USAGE, timings=Timings(total_ms=9.0, ttft_ms=5.0), **fields)


def ready(id: str) -> Ready:
    model = ModelInfo(id="a/b", context_length=8, dtype="float32", quantization="none", device="cpu")
    return Ready(id=id, protocol=1, server="0", session="s", model=model, limits=Limits(max_message_bytes=1, max_active=1))


FRAMES: dict[type[ServerMessage], Callable[[str], ServerMessage]] = {
    Loading: lambda id: Loading(id=id, model="a/b", stage="weights", progress=0.5),
    Ready: ready,
    Queued: lambda id: Queued(id=id, position=1),
    Started: lambda id: Started(id=id, model="a/b", prompt_tokens=3, cached_tokens=0),
    Prefill: lambda id: Prefill(id=id, done=1, total=3),
    Token: lambda id: Token(id=id, seq=0, n=1, text="x"),
    Resumed: lambda id: Resumed(id=id, seq=0),
    Detached: lambda id: Detached(id=id),
    Done: done,
    Error: lambda id: Error(code="load_failed", message="no", id=id),
    Goaway: lambda id: Goaway(deadline_ms=1),
    StatusReport: lambda id: StatusReport(
        server=ServerInfo(version="0", uptime_s=1.0, draining=False),
        models=[],
        available=[],
        connection=ConnectionInfo(session="s", active=[]),
    ),
}

# From protocol.md: what may be said of an id, after what.
LEGAL: dict[tuple[type[ServerMessage], ...], set[type[ServerMessage]]] = {
    (): {Queued, Started, Done},
    (Queued,): {Queued, Started, Done},
    (Queued, Queued, Started): {Prefill, Token, Detached, Done},
    (Started, Prefill): {Prefill, Token, Detached, Done},
    (Started, Token): {Token, Detached, Done},
    (Started, Prefill, Token, Token): {Token, Detached, Done},
}
LEGAL_OF_A_RESUME: dict[tuple[type[ServerMessage], ...], set[type[ServerMessage]]] = {
    (): {Resumed},
    (Resumed,): {Prefill, Token, Detached, Done},
    (Resumed, Prefill): {Prefill, Token, Detached, Done},
    (Resumed, Token): {Token, Detached, Done},
}
LEGAL_OF_A_LOAD: dict[tuple[type[ServerMessage], ...], set[type[ServerMessage]]] = {
    (): {Loading, Ready, Error},
    (Loading, Loading): {Loading, Ready, Error},
}


@pytest.fixture
def session() -> Session:
    return Session("s", ServerState(started_at=0.0, max_active=2))


def resume(id: str) -> Resume:
    return Resume(id=id, resume_token="t")


def stranger() -> Session:
    return Session("s", ServerState(started_at=0.0, max_active=2, needs_key=True))


def whose(key: str) -> str | None:
    return {"right": "alice"}.get(key)


@pytest.mark.parametrize(
    "message",
    [Init(id="i"), Init(id="i", model="a/b"), Generate(id="i", prompt="x"), Cancel(id="i"), Cancel(), resume("i"), Status()],
)
def test_a_stranger_s_words_are_refused_and_count_as_bad_until_it_says_who_it_is(message: ClientMessage) -> None:
    session = stranger()
    for _ in range(session.max_bad_messages):
        with pytest.raises(Refusal) as refused:
            session.authenticate(message, whose)
        assert not isinstance(refused.value, WrongKey)
        answer = session.answer(refused.value)
        assert type(answer) is (Done if isinstance(message, Generate) else Error)
        assert answer.id == getattr(message, "id", None)
        assert (answer.error if isinstance(answer, Done) else answer).code == "unauthenticated"  # type: ignore[union-attr]
    assert not session.authenticated
    session.authenticate(Init(token="right"), whose)
    assert (session.authenticated, session.key) == (True, "alice")
    session.authenticate(message, whose)


def test_a_stranger_who_says_too_much_is_to_be_closed() -> None:
    session, refusal = stranger(), Refusal("unauthenticated", "")
    for _ in range(session.max_bad_messages):
        session.answer(refusal)
    with pytest.raises(TooManyBadMessages):
        session.answer(refusal)


@pytest.mark.parametrize("token", ["wrong", ""])
def test_a_wrong_key_is_told_from_none(token: str) -> None:
    session = stranger()
    with pytest.raises(WrongKey) as refused:
        session.authenticate(Init(id="i", token=token), whose)
    assert session.answer(refused.value) == Error(code="unauthenticated", message=refused.value.message, id="i")
    assert not session.authenticated


def test_who_is_known_already_or_need_not_be_is_not_asked(session: Session) -> None:
    known = stranger()
    known.key = "bob"
    for each in (session, known):
        each.authenticate(Init(token="wrong"), whose)
        each.authenticate(Status(), whose)
    assert (session.key, known.key) == (None, "bob")


def opened(session: Session, message: Init | Generate | Resume, *frames: type[ServerMessage]) -> str:
    id = session.open(message)
    for kind in frames:
        session.admit(FRAMES[kind](id), 0.0)
    return id


def test_the_frames_of_this_file_are_all_there_are() -> None:
    assert set(FRAMES) == set(get_args(ServerMessage))


# What the server may say.


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(
    ("message", "before", "legal"),
    [(Generate(id="x", prompt="p"), before, legal) for before, legal in LEGAL.items()]
    + [(Init(id="x"), before, legal) for before, legal in LEGAL_OF_A_LOAD.items()]
    + [(resume("x"), before, legal) for before, legal in LEGAL_OF_A_RESUME.items()],
)
def test_a_frame_goes_out_unchanged_where_it_is_legal_and_is_a_bug_elsewhere(
    session: Session, message: Init | Generate | Resume, before: tuple[type, ...], legal: set[type], kind: type
) -> None:
    opened(session, message, *before)
    frame = FRAMES[kind]("x")
    if kind is Queued and Queued in before:
        frame = Queued(id="x", position=frame.position + 1)
    if kind in legal:
        assert session.admit(frame, 1.0) is frame
        assert session.active == ([] if kind in (Done, Ready, Error, Detached) else ["x"])
    else:
        with pytest.raises(IllegalFrame, match=kind.__name__):
            session.admit(frame, 1.0)
        assert session.active == ["x"]


def test_a_place_in_line_is_told_once_and_again_when_it_changes(session: Session) -> None:
    session.open(Generate(id="x", prompt="p"))
    told = [session.admit(Queued(id="x", position=p), 1.0) for p in (3, 3, 2, 2, 1, 1)]
    assert [frame.position for frame in told if isinstance(frame, Queued)] == [3, 2, 1]


def test_an_illegal_frame_leaves_what_is_legal_as_it_was(session: Session) -> None:
    opened(session, Generate(id="x", prompt="p"), Started)
    with pytest.raises(IllegalFrame, match="its prefill began"):
        session.admit(FRAMES[Queued]("x"), 1.0)
    assert session.admit(FRAMES[Prefill]("x"), 1.0)


@pytest.mark.parametrize("kind", [kind for kind in FRAMES if kind not in (Goaway, StatusReport)])
@pytest.mark.parametrize("end", ["never opened", "ended"])
def test_nothing_may_be_said_of_an_id_that_is_not_open(session: Session, kind: type, end: str) -> None:
    if end == "ended":
        opened(session, Generate(id="x", prompt="p"), Done)
    with pytest.raises(IllegalFrame, match="not open"):
        session.admit(FRAMES[kind]("x"), 1.0)


# What a client may say.


def test_an_id_that_has_ended_may_be_used_again(session: Session) -> None:
    for _ in range(2):
        assert opened(session, Generate(id="x", prompt="p"), Started, Token, Done) == "x"


@pytest.mark.parametrize("first", [Generate(id="x", prompt="p"), Init(id="x"), resume("x")])
@pytest.mark.parametrize("second", [Generate(id="x", prompt="q"), Init(id="x", model="c/d"), resume("x")])
def test_an_id_in_use_is_refused_with_an_error_and_the_first_goes_on(
    session: Session, first: Init | Generate | Resume, second: Init | Generate | Resume
) -> None:
    session.open(first)
    chosen = session.chosen
    with pytest.raises(Refusal) as caught:
        session.open(second)
    frame = session.answer(caught.value)
    assert isinstance(frame, Error)
    assert (frame.code, frame.id) == ("duplicate_id", "x")
    assert session.active == ["x"]
    assert session.chosen is chosen


def test_ids_left_out_are_given_by_the_server_and_never_collide(session: Session) -> None:
    session.open(Generate(id="auto-2", prompt="p"))
    given = [session.open(Generate(prompt="p")), session.open(Init()), session.open(Generate(prompt="p"))]
    assert len({*given, "auto-2"}) == 4
    assert session.active == ["auto-2", *given]


def test_a_draining_server_takes_nothing_new_in_and_ends_what_runs(session: Session) -> None:
    opened(session, Generate(id="x", prompt="p"), Started)
    session.server.draining = True
    for message, kind in [(Generate(id="y", prompt="p"), Done), (Generate(prompt="p"), Done), (Init(id="z"), Error)]:
        with pytest.raises(Refusal) as caught:
            session.open(message)
        frame = session.answer(caught.value)
        assert type(frame) is kind
        assert (frame.error.code if isinstance(frame, Done) else frame.code) == "shutting_down"
    assert session.chosen == Init()
    assert session.admit(done("x"), 1.0) == done("x")


def test_a_draining_server_lets_go_on_what_is_resumed(session: Session) -> None:
    session.server.draining = True
    assert opened(session, resume("x"), Resumed, Token, Done) == "x"


def test_more_ids_than_the_bound_are_refused_until_one_ends(session: Session) -> None:
    session.max_open = 2
    opened(session, Generate(id="x", prompt="p"))
    opened(session, Init(id="l"))
    for message in (Generate(id="y", prompt="p"), Init(id="m"), resume("r")):
        with pytest.raises(Refusal) as caught:
            session.open(message)
        assert (caught.value.code, caught.value.id) == ("overloaded", message.id)
        assert caught.value.answers_with_done == isinstance(message, Generate)
    session.admit(done("x"), 1.0)
    assert session.open(Generate(id="y", prompt="p")) == "y"


def test_a_refused_generate_is_answered_with_its_one_done(session: Session) -> None:
    frame = session.answer(Refusal("bad_message", "$.top_k: no", "x", answers_with_done=True))
    assert frame == Done(
        id="x",
        finish_reason="error",
        usage=Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0),
        timings=Timings(total_ms=0.0),
        error=ErrorDetail(code="bad_message", message="$.top_k: no"),
    )
    assert session.active == []


def test_a_refused_generate_without_an_id_is_answered_under_a_new_one(session: Session) -> None:
    session.open(Generate(id="auto-1", prompt="p"))
    frame = session.answer(Refusal("bad_message", "$: no", answers_with_done=True))
    assert isinstance(frame, Done)
    assert frame.id not in ("auto-1", None, "")


def test_a_bad_generate_with_the_id_of_a_running_one_does_not_end_that_one(session: Session) -> None:
    opened(session, Generate(id="x", prompt="p"), Started)
    frame = session.answer(Refusal("bad_message", "$.top_k: no", "x", answers_with_done=True))
    assert frame == Error(code="bad_message", message="$.top_k: no", id="x")
    assert session.active == ["x"]


# Rates. Ten seconds' worth may come at once.


def paced(rate: float = 0.5, **settings: Any) -> Session:
    return Session("s", ServerState(0.0, 2, config=Config(messages_per_second=rate, **settings)))


def say(session: Session, message: ClientMessage, now: float, text: str = "") -> None:
    session.heard(text, now)
    session.understood(message, now)


def test_a_message_too_early_is_refused_until_its_time_has_come() -> None:
    session = paced()
    for _ in range(5):
        say(session, Status(), 1.0)
    with pytest.raises(Refusal) as refusal:
        say(session, Generate(id="g", prompt="p"), 1.5)
    assert (refusal.value.code, refusal.value.retry_after) == ("rate_limited", 1.5)
    answer = session.answer(refusal.value)
    assert isinstance(answer, Done)
    assert answer.error
    assert (answer.id, answer.error.code, answer.error.retry_after_ms) == ("g", "rate_limited", 1500)
    say(session, Generate(id="g", prompt="p"), 3.0)


def test_a_cancel_is_taken_at_any_rate() -> None:
    session = paced()
    for _ in range(20):
        say(session, Cancel(), 0.0)


@pytest.mark.parametrize(
    ("said", "id", "answered_with"),
    [
        ({"type": "generate", "id": "g", "messages": [{"role": "wizard"}] * 1000}, "g", Done),
        ({"type": "init", "id": "i", "model": 5}, "i", Error),
        ({"type": "status"}, None, Error),
    ],
)
def test_of_a_message_too_early_only_what_its_answer_needs_is_read(
    said: dict[str, Any], id: str | None, answered_with: type
):
    session = paced(rate=0.01)
    session.heard("", 0.0)
    with pytest.raises(Refusal) as refusal:
        session.heard(json.dumps(said), 0.0)
    assert (refusal.value.code, refusal.value.id) == ("rate_limited", id)
    assert type(session.answer(refusal.value)) is answered_with


@pytest.mark.parametrize(
    "said", ["{", "[1]", '{"type":"nix"}', '{"type":"generate","id":7}', '{"type":"cancel"}', "[" * 10**5, '{"id":"\ud800"}']
)
def test_a_message_too_early_is_read_whole_where_it_is_none_or_is_a_cancel(said: str):
    session = paced(rate=0.01)
    session.heard("", 0.0)
    session.heard(said, 0.0)


def test_what_takes_long_to_read_weighs_more() -> None:
    session = paced()
    say(session, Status(), 0.0, 3 * 4096 * "x")
    say(session, Status(), 0.0, 256 * "[")  # one was left, and another is owed
    with pytest.raises(Refusal) as refusal:
        say(session, Status(), 0.0)
    assert refusal.value.retry_after == 4.0


def test_only_early_messages_in_a_row_are_one_too_many() -> None:
    session = paced(rate=0.1)
    for now in (0.0, 10.0):
        session.heard("", now)
        for _ in range(session.max_bad_messages):
            session.heard("", now)
    with pytest.raises(TooManyMessages):
        session.heard("", 19.9)


def test_a_client_that_had_too_many_tokens_may_ask_for_no_more_but_for_anything_else() -> None:
    session = paced(tokens_per_minute=60)
    session.account.tokens.spend(69, 0.0)
    with pytest.raises(Refusal) as refusal:
        say(session, Generate(prompt="p"), 0.0)
    assert (refusal.value.code, refusal.value.retry_after) == ("rate_limited", 10.0)
    say(session, Init(), 0.0)
    say(session, Generate(prompt="p"), 10.0)


def test_a_session_with_a_key_has_the_keys_account_and_one_without_has_its_addresss() -> None:
    server = ServerState(0.0, 2)
    here, there = Owner("address", "here"), Owner("address", "there")
    by_address = Session("a", server, address=here)
    assert by_address.account is Session("b", server, address=here).account
    assert by_address.account is not Session("c", server, address=there).account
    by_key = Session("d", server, key="k", address=here)
    assert by_key.account is Session("e", server, key="k", address=there).account
    assert by_key.account is not by_address.account


def test_any_other_refusal_is_answered_with_an_error(session: Session) -> None:
    assert session.answer(Refusal("not_active", "no", "x")) == Error(code="not_active", message="no", id="x")
    assert session.answer(Refusal("bad_json", "no")) == Error(code="bad_json", message="no")


@pytest.mark.parametrize("code", ["bad_json", "bad_message", "unknown_type"])
def test_only_bad_messages_in_a_row_are_one_too_many(session: Session, code: Any) -> None:
    for _ in range(2):
        for _ in range(session.max_bad_messages):
            assert session.answer(Refusal(code, "no"))
        session.understood(Status(), 0.0)
    for _ in range(session.max_bad_messages):
        session.answer(Refusal(code, "no"))
        session.answer(Refusal("not_active", "no"))
    with pytest.raises(TooManyBadMessages):
        session.answer(Refusal(code, "no"))


# Cancel.


@pytest.mark.parametrize(
    ("before", "kind"),
    [(before, kind) for before, legal in LEGAL.items() for kind in sorted(legal - {Done, Detached}, key=str)],
)
def test_after_a_cancel_only_the_done_comes_and_says_cancelled_whatever_it_was_going_to_say(
    session: Session, before: tuple[type, ...], kind: type
) -> None:
    opened(session, Generate(id="x", prompt="p"), *before)
    assert session.cancel(Cancel(id="x"), 10.0) == ["x"]
    assert session.admit(FRAMES[kind]("x"), 10.01) is None
    end = session.admit(done("x", "error", error=ErrorDetail(code="internal", message="no")), 10.0425)
    timings = Timings(total_ms=9.0, ttft_ms=5.0, cancel_ms=42.5)
    assert end == Done(id="x", finish_reason="cancelled", usage=USAGE, timings=timings)
    assert session.active == []


def test_a_done_that_comes_before_the_cancel_is_read_wins_the_race(session: Session) -> None:
    opened(session, Generate(id="x", prompt="p"), Started, Token)
    assert session.admit(done("x", "length"), 1.0) == done("x", "length")
    with pytest.raises(Refusal) as caught:
        session.cancel(Cancel(id="x"), 1.0)
    assert (caught.value.code, caught.value.id, caught.value.answers_with_done) == ("not_active", "x", False)


def test_a_second_cancel_stops_nothing_and_adds_no_frame(session: Session) -> None:
    opened(session, Generate(id="x", prompt="p"), Started)
    session.cancel(Cancel(id="x"), 1.0)
    assert session.cancel(Cancel(id="x"), 2.0) == []
    assert session.cancel(Cancel(), 2.0) == []
    end = session.admit(done("x"), 3.0)
    assert isinstance(end, Done)
    assert end.timings.cancel_ms == 2000


@pytest.mark.parametrize("cancel", [Cancel(), Cancel(id="y")])
def test_a_cancel_of_what_is_not_active_is_refused_harmlessly(session: Session, cancel: Cancel) -> None:
    if cancel.id:
        opened(session, Generate(id="x", prompt="p"), Started)
    with pytest.raises(Refusal) as caught:
        session.cancel(cancel, 1.0)
    assert session.answer(caught.value) == Error(code="not_active", message=caught.value.message, id=cancel.id)
    assert session.cancel(Cancel(id="x"), 2.0) == ["x"] if cancel.id else not session.active


def test_a_cancel_without_id_stops_all_that_is_not_stopping_yet(session: Session) -> None:
    for message in (Generate(id="x", prompt="p"), Init(id="l"), Generate(id="y", prompt="p")):
        session.open(message)
    session.cancel(Cancel(id="l"), 1.0)
    assert session.cancel(Cancel(), 2.0) == ["x", "y"]


def test_what_is_taken_elsewhere_after_its_cancel_was_read_ends_here_without_a_done(session: Session) -> None:
    opened(session, Generate(id="x", prompt="p"), Started, Token)
    session.cancel(Cancel(id="x"), 1.0)
    assert session.admit(Detached(id="x"), 2.0) == Detached(id="x")
    assert not session.has("x")


def test_a_cancelled_load_ends_in_an_error_even_if_the_model_came_in_time(session: Session) -> None:
    for last in (Ready, Error):
        opened(session, Init(id="l", model="a/b"), Loading)
        session.cancel(Cancel(id="l"), 1.0)
        assert session.admit(FRAMES[Loading]("l"), 1.0) is None
        end = session.admit(FRAMES[last]("l"), 1.0)
        assert isinstance(end, Error)
        assert (end.code, end.id) == ("cancelled", "l")
        assert session.chosen == Init()


def test_a_shutdown_ends_generations_and_loads_in_its_own_name(session: Session) -> None:
    opened(session, Generate(id="x", prompt="p"), Started)
    opened(session, Init(id="l"))
    assert session.stop(session.active, "shutdown", 1.0) == ["x", "l"]
    assert session.admit(FRAMES[Token]("x"), 2.0) is None
    assert session.admit(done("x"), 2.0) == done("x", "shutdown")
    end = session.admit(ready("l"), 2.0)
    assert isinstance(end, Error)
    assert (end.code, end.id) == ("shutting_down", "l")


# What is known of a connection.


def test_the_open_ids_are_told_oldest_first(session: Session) -> None:
    for id in ("b", "a", "c"):
        session.open(Generate(id=id, prompt="p"))
    session.admit(done("a"), 1.0)
    assert session.info() == ConnectionInfo(session="s", active=["b", "c"])


# Which model the next generate uses. `a` and `b` are inits in the order in which they were read.

INITS = {id: Init(id=id, model=f"vendor/{id}") for id in "abc"}


@pytest.mark.parametrize(
    ("events", "chosen"),
    [
        ("", None),
        ("a", "a"),
        ("a a+", "a"),
        ("a a-", None),
        ("a a+ b", "b"),
        ("a a+ b b-", "a"),
        ("a a+ b b+ c c-", "b"),
        ("a b a-", "b"),
        ("a b a- b-", None),
        ("a b a+", "b"),
        ("a b a+ b-", "a"),
        ("a b b- a+", "a"),
        ("a b b+ a+", "b"),
        ("a b b+ a-", "b"),
        ("a b b+ a+ c c-", "b"),
        ("a b c c- b- a-", None),
    ],
)
def test_the_model_chosen_is_that_of_the_last_init_that_did_not_fail(
    session: Session, events: str, chosen: str | None
) -> None:
    for event in events.split():
        id = event[0]
        if event == id:
            session.open(INITS[id])
        else:
            session.admit(ready(id) if event[1] == "+" else FRAMES[Error](id), 1.0)
    assert session.chosen == (INITS[chosen] if chosen else Init())


# Everything at once, against a model of four facts per id.

AFTER = {(before[-1] if before else None): legal for before, legal in LEGAL.items()}
AFTER_OF_A_RESUME = {(before[-1] if before else None): legal for before, legal in LEGAL_OF_A_RESUME.items()}
AFTER_OF_A_LOAD = {(before[-1] if before else None): legal for before, legal in LEGAL_OF_A_LOAD.items()}
OPENERS: dict[str, Callable[[str | None], Any]] = {
    "load": lambda id: Init(id=id),
    "resume": lambda id: resume(id or "r"),
    "generate": lambda id: Generate(id=id, prompt="p"),
}


class Walk(RuleBasedStateMachine):
    """Clients and server say what they like; the session must let out exactly what protocol.md allows."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.session = Session("s", ServerState(started_at=0.0, max_active=2), max_open=4)
        self.order: dict[str, list[type]] = {}  # what was said of each open id, swallowed frames too
        self.legal: dict[str, dict[Any, set[type[ServerMessage]]]] = {}
        self.loads: set[str] = set()
        self.stopped: dict[str, str] = {}
        self.ends = self.let_in = 0

    @rule(target=ids, id=st.sampled_from(["a", "b", "auto-1", "auto-2", None]), kind=st.sampled_from(list(OPENERS)))
    def open(self, id: str | None, kind: str) -> str:
        message = OPENERS[kind](id)
        id, draining = message.id, self.session.server.draining and kind != "resume"
        expected = "duplicate_id" if id in self.order else "shutting_down" if draining else None
        expected = expected or ("overloaded" if len(self.order) == 4 else None)
        if expected:
            with pytest.raises(Refusal) as caught:
                self.session.open(message)
            assert (caught.value.code, caught.value.id) == (expected, id)
            answer = self.session.answer(caught.value)
            assert isinstance(answer, Done if kind == "generate" and expected != "duplicate_id" else Error)
            return answer.id or "none"
        opened = self.session.open(message)
        assert opened == id or (id is None and opened not in self.order)
        self.order[opened], self.let_in = [], self.let_in + 1
        self.loads |= {opened} if kind == "load" else set()
        self.legal[opened] = {"load": AFTER_OF_A_LOAD, "resume": AFTER_OF_A_RESUME, "generate": AFTER}[kind]
        return opened

    @rule(id=st.one_of(ids, st.none()), now=st.floats(0, 100))
    def cancel(self, id: str | None, now: float) -> None:
        named = list(self.order) if id is None else [id] if id in self.order else []
        if not named:
            with pytest.raises(Refusal, match="active"):
                self.session.cancel(Cancel(id=id), now)
            return
        fresh = [id for id in named if id not in self.stopped]
        assert self.session.cancel(Cancel(id=id), now) == fresh
        self.stopped.update(dict.fromkeys(fresh, "cancelled"))

    @rule()
    def shut_down(self) -> None:
        fresh = self.session.stop(self.session.active, "shutdown", 0.0)
        assert fresh == [id for id in self.order if id not in self.stopped]
        self.stopped.update(dict.fromkeys(fresh, "shutdown"))

    @precondition(lambda self: self.let_in > 5)
    @rule()
    def drain(self) -> None:
        self.session.server.draining = True

    @rule(id=ids, kind=st.sampled_from([kind for kind in FRAMES if kind not in (Goaway, StatusReport)]))
    def say(self, id: str, kind: type) -> None:
        frame = FRAMES[kind](id)
        if not self._legal(id, kind):
            with pytest.raises(IllegalFrame):
                self.session.admit(frame, 100.0)
            return
        out = self.session.admit(frame, 100.0)
        stopped = self.stopped.get(id)
        told_before = kind is Queued and Queued in self.order[id]  # and the place in line is always the same here
        self.order[id].append(kind)
        if kind not in (Ready, Done, Detached, Error):
            assert out is (None if stopped or told_before else frame)
            return
        self._ended(id, frame, out, stopped)

    def _legal(self, id: str, kind: type) -> bool:
        return id in self.order and kind in self.legal[id][self.order[id][-1] if self.order[id] else None]

    def _ended(self, id: str, frame: ServerMessage, out: ServerMessage | None, stopped: str | None) -> None:
        if stopped is None or isinstance(frame, Detached):
            assert out is frame
        elif id in self.loads:
            assert isinstance(out, Error)
            assert (out.code, out.id) == ("cancelled" if stopped == "cancelled" else "shutting_down", id)
        else:
            assert isinstance(out, Done)
            assert (out.finish_reason, out.error, out.usage) == (stopped, None, USAGE)
            assert (out.timings.cancel_ms is not None) == (stopped == "cancelled")
        del self.order[id]
        self.loads.discard(id)
        self.stopped.pop(id, None)
        self.ends += 1

    @invariant()
    def every_id_let_in_is_open_or_has_had_its_one_end(self) -> None:
        assert self.session.active == list(self.order)
        assert self.let_in == self.ends + len(self.order)


Walk.TestCase.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
TestWalk = Walk.TestCase
