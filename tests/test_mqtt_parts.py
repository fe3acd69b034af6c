"""The parts of the MQTT face that are pure: topics, addresses, what a message says, pacing, repeats, back-off."""

import contextlib
import itertools
import random
import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsserver.auth import Keys
from wsserver.config import BadSetting, Config
from wsserver.protocol import Detached, Done, Error, FinishReason, ServerMessage, Timings, Token, Usage
from wsserver_mqtt import intake as intake_module
from wsserver_mqtt.address import address, see_to_keys
from wsserver_mqtt.answered import Answered, Asked
from wsserver_mqtt.back_off import delays
from wsserver_mqtt.guesses import Guesses
from wsserver_mqtt.incoming import Incoming, Unanswerable, read
from wsserver_mqtt.intake import Excess, Intake, Publisher
from wsserver_mqtt.messages import Arrived
from wsserver_mqtt.pace import Pace
from wsserver_mqtt.share import Share
from wsserver_mqtt.topics import Topics, topics

KITCHEN = Topics("llm/kitchen", ("devices",))


def done(id: str = "g", text: str = "", reason: FinishReason = "stop") -> Done:
    usage = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0)
    return Done(id=id, finish_reason=reason, usage=usage, timings=Timings(total_ms=1.0), text=text)


# Topics.


@pytest.mark.parametrize(
    ("reply", "user", "allowed"),
    [
        ("llm/kitchen/reply/me", "", True),
        ("llm/kitchen/reply/a/b/c", "", True),
        ("llm/kitchen/reply/alice/phone", "alice", True),
        ("llm/kitchen/reply/bob/phone", "alice", False),
        ("llm/kitchen/reply/alice", "alice", False),
        ("llm/kitchen/reply/alice/", "alice", False),
        ("llm/kitchen/reply/alicette/x", "alice", False),
        ("llm/kitchen/reply", "", False),
        ("llm/kitchen/reply/", "", False),
        ("llm/kitchen/status", "", False),
        ("devices", "", True),
        ("devices/lamp", "alice", True),
        ("devicesque", "", False),
        ("", "", False),
        ("llm/kitchen/reply/+", "", False),
        ("llm/kitchen/reply/a#", "", False),
        ("llm/kitchen/reply/a\n", "", False),
        ("llm/kitchen/reply/a\x00", "", False),
        ("llm/kitchen/reply/a\ufffe", "", False),
        ("llm/kitchen/reply/" + "x" * 1024, "", False),
        ("llm/kitchen/reply" + "/x" * 64, "", False),
    ],
)
def test_answers_go_below_the_root_or_where_the_operator_allows(reply: str, user: str, allowed: bool) -> None:
    assert KITCHEN.allows(reply, user) is allowed


@pytest.mark.parametrize(
    ("topic", "user"),
    [
        ("llm/kitchen/request", ""),
        ("llm/kitchen/request/alice", "alice"),
        ("llm/kitchen/cancel/alice", "alice"),
        ("llm/kitchen/request/", None),
        ("llm/kitchen/request/alice/phone", None),
        ("llm/kitchen/requests", None),
        ("llm/kitchen/status", None),
    ],
)
def test_a_request_may_name_a_user_in_its_topic(topic: str, user: str | None) -> None:
    assert KITCHEN.user(topic) == user


@pytest.mark.parametrize("root", ["", "a/", "a/+", "#", "$SYS/a", "a\0", "x" * 2000])
def test_a_root_that_is_no_topic_is_refused(root: str) -> None:
    with pytest.raises(BadSetting, match="--mqtt-root"):
        topics(root, ())
    with pytest.raises(BadSetting, match="--mqtt-reply-topics"):
        topics("fine", ("fine/too", root))


# Addresses.


def test_a_url_says_where_the_broker_is_and_who_connects() -> None:
    plain = address("mqtt://kit%40chen@broker:1884", "secret")
    assert (plain.host, plain.port, plain.user, plain.password, plain.tls) == ("broker", 1884, "kit@chen", "secret", None)
    assert address("mqtt://[::1]", None).host == "::1"
    assert address("mqtt://broker", None).port == 1883
    secure = address("mqtts://broker", None)
    assert secure.port == 8883
    assert secure.tls
    assert secure.tls.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (secure.tls.verify_mode, secure.tls.check_hostname) == (ssl.CERT_REQUIRED, True)


@pytest.mark.parametrize(
    ("url", "password", "words"),
    [
        ("http://broker", None, "no broker's"),
        ("broker:1883", None, "no broker's"),
        ("mqtt://", None, "no broker's"),
        ("mqtt://broker/path", None, "no broker's"),
        ("mqtt://broker?x=1", None, "no broker's"),
        ("mqtt://broker:port", None, "no URL"),
        ("mqtt://user:hush@broker:port", None, "no URL"),
        ("http://user:hush@broker", None, "WSSERVER_MQTT_PASSWORD"),
        ("mqtt://user:hush@broker", None, "WSSERVER_MQTT_PASSWORD"),
        ("mqtt://broker", "hush", "no user"),
    ],
)
def test_a_url_that_is_no_brokers_is_refused_and_no_password_repeated(url: str, password: str | None, words: str) -> None:
    with pytest.raises(BadSetting, match=words) as refused:
        address(url, password)
    assert "hush" not in str(refused.value)


def test_certificates_are_for_tls_and_must_be_usable(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("")
    for url, files in (
        ("mqtt://broker", {"ca": str(nothing)}),
        ("mqtts://broker", {"ca": str(nothing)}),
        ("mqtts://broker", {"certificate": str(nothing)}),
        ("mqtts://broker", {"certificate": str(nothing), "key": str(nothing)}),
    ):
        with pytest.raises(BadSetting, match="--mqtt-"):
            address(url, None, **files)


def test_a_server_without_keys_is_for_its_own_machine_unless_the_operator_says_otherwise() -> None:
    with pytest.raises(BadSetting, match="anybody who may publish on broker"):
        see_to_keys(Config(), Keys({}), "broker")
    see_to_keys(Config(), Keys({}), "127.0.0.1")
    see_to_keys(Config(insecure=True), Keys({}), "broker")
    see_to_keys(Config(), Keys({"alice": b"hash"}), "broker")


# What a message says.


def arrived(payload: bytes, topic: str = "llm/kitchen/request", **properties: object) -> Incoming:
    return read(Arrived(topic, payload, **properties), KITCHEN, 1000, 8)  # type: ignore[arg-type]


def test_properties_come_before_what_the_payload_says() -> None:
    payload = b'{"reply_to":"llm/kitchen/reply/b","token":"in payload"}'
    said = arrived(payload, response_topic="llm/kitchen/reply/a", user_properties={"token": "in property"})
    assert (said.reply, said.token) == ("llm/kitchen/reply/a", "in property")
    said = arrived(payload)
    assert (said.reply, said.token, said.text) == ("llm/kitchen/reply/b", "in payload", payload.decode())


def test_what_is_no_json_can_be_answered_only_by_a_response_topic() -> None:
    with pytest.raises(Unanswerable, match="no Response Topic"):
        arrived(b"no json")
    assert arrived(b"no json", response_topic="llm/kitchen/reply/a").text == "no json"
    assert arrived(b"\xff", response_topic="llm/kitchen/reply/a").text is None
    assert arrived(b"x" * 1001, response_topic="llm/kitchen/reply/a").text is None


def test_an_empty_cancel_is_one_of_everything() -> None:
    said = arrived(b"", "llm/kitchen/cancel/alice", response_topic="llm/kitchen/reply/alice/a")
    assert (said.text, said.only_cancels, said.user) == ('{"type":"cancel"}', True, "alice")


@given(st.binary(max_size=200), st.sampled_from(["llm/kitchen/request", "llm/kitchen/cancel", "llm/kitchen/request/a/b"]))
def test_whatever_comes_is_read_or_said_to_be_unanswerable(payload: bytes, topic: str) -> None:
    with contextlib.suppress(Unanswerable):
        assert KITCHEN.allows(arrived(payload, topic).reply, "")


# Pacing.

STEPS = st.lists(
    st.tuples(
        st.floats(0, 0.2),
        st.one_of(st.tuples(st.sampled_from("ab"), st.sampled_from(["token", "done", "error"])), st.none()),
    )
)


@given(STEPS)
def test_tokens_go_out_no_more_often_than_the_interval_and_none_is_lost_or_moved(
    steps: list[tuple[float, tuple[str, str] | None]],
) -> None:
    pace, now = Pace(0.05), 0.0
    seqs = {"a": 0, "b": 0}
    sent: dict[str, list[tuple[float, ServerMessage]]] = {"a": [], "b": []}
    said: dict[str, str] = {"a": "", "b": ""}
    for passed, step in steps:
        now += passed
        out = pace.release(now)
        if step:
            id, kind = step
            frame: ServerMessage
            if kind == "token":
                frame, seqs[id], said[id] = Token(id=id, seq=seqs[id], n=1, text=str(seqs[id])), seqs[id] + 1, said[id] + "x"
            else:
                frame = done(id) if kind == "done" else Error(code="internal", message="", id=id)
            out += pace.push(frame, now)
        for frame in out:
            sent[getattr(frame, "id", "")].append((now, frame))
        assert pace.due() is None or pace.due() > now
    for id, frames in sent.items():
        for answer in _answers([(at, frame) for at, frame in frames if not isinstance(frame, Error)]):
            tokens = [(at, frame) for at, frame in answer if isinstance(frame, Token)]
            ended = isinstance(answer[-1][1], Done)
            paced = tokens[:-1] if ended else tokens  # the end takes along what is held
            assert all(later - earlier > 0.05 - 1e-9 for (earlier, _), (later, _) in itertools.pairwise(paced))
            seq = None
            for _, frame in tokens:
                assert seq in (None, frame.seq), f"{id}: a gap"
                seq = frame.seq + frame.n


def _answers(frames: list[tuple[float, ServerMessage]]) -> list[list[tuple[float, ServerMessage]]]:
    """Give the frames of each generation of an id."""
    answers: list[list[tuple[float, ServerMessage]]] = [[]]
    for at, frame in frames:
        answers[-1].append((at, frame))
        if isinstance(frame, Done):
            answers.append([])
    return [answer for answer in answers if answer]


def test_what_is_dropped_is_not_held_any_more() -> None:
    pace = Pace(10.0)
    assert len(pace.push(Token(id="g", seq=0, n=1, text="a"), 0.0)) == 1
    assert pace.push(Token(id="g", seq=1, n=1, text="b"), 1.0) == []
    assert pace.due() == 10.0
    pace.drop("g")
    assert pace.due() is None
    assert pace.push(done(), 2.0) == [done()]
    assert len(pace.push(Token(id="g", seq=0, n=1, text="c"), 3.0)) == 1
    assert pace.push(Detached(id="g"), 4.0) == [Detached(id="g")]


# Repeats.


def asked(id: str) -> Asked:
    return Asked("topic", ("key", "alice"), id)


def test_an_answer_is_found_by_the_same_words_from_the_same_client_for_a_while() -> None:
    kept = Answered(window=10.0)
    kept.add(asked("g"), b"digest", done(text="hello"), 0.0)
    assert kept.find(asked("g"), b"digest", 9.0) == done(text="hello")
    assert kept.find(asked("g"), b"other", 9.0) is None
    assert kept.find(asked("other"), b"digest", 9.0) is None
    assert kept.find(Asked("topic", ("key", "bob"), "g"), b"digest", 9.0) is None
    assert kept.find(asked("g"), b"digest", 10.0) is None
    assert (len(kept), kept.size) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 500), st.floats(0, 5))))
def test_what_is_kept_stays_within_its_bytes_and_its_time(answers: list[tuple[str, int, float]]) -> None:
    kept, now = Answered(window=10.0, max_bytes=2000), 0.0
    for id, length, passed in answers:
        now += passed
        kept.add(asked(id), b"", done(id, "x" * length), now)
        assert 0 < kept.size <= 2000
        assert kept.find(asked(id), b"", now) == done(id, "x" * length)


# Back-off.


def test_waits_grow_to_a_bound_and_are_drawn() -> None:
    waits = list(itertools.islice(delays(1.0, 30.0, random.Random(1)), 10))
    for wait, most in zip(waits, [1, 2, 4, 8, 16, 30, 30, 30, 30, 30], strict=True):
        assert most / 2 <= wait <= most
    assert waits != list(itertools.islice(delays(1.0, 30.0, random.Random(2)), 10))


# Who is read, and how much.


def intake(each: float = 1.0, together: float = 100.0) -> Intake:
    return Intake(each, together)


ALICE, BOB, SOMEBODY = Publisher("alice", "a", False), Publisher("bob", "b", False), Publisher("", "r", False)


def test_a_publisher_has_its_rate_whatever_topics_for_answers_it_names() -> None:
    bounds = intake()
    let_in = [bounds.take(ALICE._replace(reply=str(number)), 10, 0.0) is None for number in range(30)]
    assert let_in == [True] * 10 + [False] * 20
    assert bounds.take(BOB, 10, 0.0) is None
    assert bounds.take(ALICE._replace(cancels=True), 10, 0.0) is None, "a cancel comes through"
    assert bounds.take(ALICE, 10, 1.0) is None, "after a second there is one more"
    assert bounds.take(ALICE, 10, 1.0) is not None


def test_one_answer_a_second_tells_of_those_that_were_dropped() -> None:
    bounds = intake()
    for _ in range(10):
        bounds.take(ALICE, 10, 0.0)
    told = [bounds.take(ALICE, 10, now) for now in (0.0, 0.0, 0.0, 0.5)]
    assert [excess and excess.answered for excess in told] == [True, False, False, False]
    assert bounds.take(ALICE, 10, 1.5) is None, "one and a half were filled up meanwhile"
    assert bounds.take(ALICE, 10, 1.5) == Excess(answered=True, dropped=3, retry_after=0.5)
    assert bounds.dropped() == 3
    assert bounds.dropped() == 0


def test_those_without_a_user_leave_half_to_the_others() -> None:
    bounds = intake(each=10.0, together=20.0)
    let_in = sum(bounds.take(SOMEBODY._replace(reply=str(number)), 10, 0.0) is None for number in range(1000))
    assert let_in == 100, "half of the 200 of ten seconds"
    assert all(bounds.take(ALICE, 10, 0.0) is None for _ in range(100))
    assert bounds.take(BOB, 10, 0.0) is not None, "and that was all there is"


def test_long_messages_count_more_and_so_many_publishers_are_remembered() -> None:
    bounds = intake(each=10.0, together=1e9)
    assert sum(bounds.take(ALICE, 40 * 4096, 0.0) is None for _ in range(100)) == 3
    for number in range(5000):
        bounds.take(Publisher(str(number), "", False), 10, 0.0)
    assert len(bounds) == intake_module.REMEMBERED


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", "u", "v"]), st.floats(0, 0.5)), max_size=200))
def test_what_is_let_in_answered_and_dropped_is_all_there_was(asked: list[tuple[int, str, float]]) -> None:
    bounds, now, let_in, answered = Intake(0.5, 2.0), 0.0, 0, 0
    for reply, user, pause in asked:
        now += pause
        excess = bounds.take(Publisher(user, str(reply), False), 10, now)
        let_in += excess is None
        answered += excess is not None and excess.answered
    assert let_in <= 20 + 2 * now + 1
    assert answered <= 20 + 20 * now + 1
    assert let_in + answered + bounds.dropped() == len(asked)


def test_guesses_of_all_names_together_are_bounded_and_known_ones_go_on() -> None:
    guesses = Guesses(limit=3)
    guesses.right("alice", "a")
    for number in range(200):
        if not guesses.wait(f"user {number}", "r", 0.0):
            guesses.wrong(f"user {number}", "r", 0.0)
    assert guesses.wait("somebody new", "r", 0.0) > 0, "thirty of all names were compared"
    assert guesses.wait("alice", "another", 0.0) == 0
    assert guesses.wait("somebody new", "r", 60.0) == 0
    for _ in range(3):
        guesses.wrong("alice", "a", 61.0)
    assert guesses.wait("alice", "a", 61.0) == 60
    assert guesses.wait("bob", "b", 61.0) == 0, "she guesses at her own cost"


def test_without_a_name_a_topic_is_known_by_the_right_key_that_was_shown_there() -> None:
    guesses = Guesses(limit=2)
    guesses.right("", "mine")
    for number in range(2):
        guesses.wrong("", f"other {number}", 0.0)
    assert guesses.wait("", "a third", 0.0) == 60
    assert guesses.wait("", "mine", 0.0) == 0
    assert guesses.wait("alice", "mine", 0.0) == 0, "a name is counted by itself"


@given(st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.05)), min_size=1, max_size=100))
def test_work_takes_no_more_than_its_share_of_the_time(pieces: list[tuple[float, float]]) -> None:
    share, now, worked = Share(0.2, 0.02), 0.0, 0.0
    for pause, work in pieces:
        now += pause
        assert worked <= 0.02 + 0.2 * now + max(work for _, work in pieces) + 1e-9
        worked += work
        now += work + share.rest_after(work, now + work)
