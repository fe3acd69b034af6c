"""Who may do what over a broker: the configuration and access list in deploy/, TLS, certificates, keys and limits."""

import asyncio
import contextlib
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from handlers import dispatcher
from handlers.status import overview
from tests.conftest import ECHO, eventually
from tests.mosquitto import OPEN, ROOT, Device, Mosquitto, device, free_port, mosquitto, needs_mosquitto, serving
from tests.scripted import ScriptedModel, scripted
from tests.test_main import COMMAND, ON_ECHO, failed, process
from tests.test_tls import make
from wsserver.auth import Keys, digest
from wsserver_mqtt.address import address
from wsserver_mqtt.broker import Broker
from wsserver_mqtt.face import Face
from wsserver_mqtt.messages import Arrived, Outgoing
from wsserver_mqtt.topics import Topics

pytestmark = needs_mosquitto
DEPLOY = Path(__file__).parent.parent / "deploy" / "mosquitto"
REQUEST = {"type": "generate", "id": "g", "prompt": "hello"}


class Secured(Mosquitto):
    """A broker with what is in deploy/: `url` is for programs on its machine, `tls_url` for everybody else."""

    def __init__(self, folder: Path) -> None:
        shutil.copy(DEPLOY / "wsserver.acl", folder)
        for name in ("wsserver", "alice", "bob", "stranger"):
            create = [] if (folder / "passwords").exists() else ["-c"]
            subprocess.run(["mosquitto_passwd", "-b", *create, folder / "passwords", name, f"{name}'s"], check=True)
        make(folder)
        self.tls_port = free_port()
        self.ca = str(folder / "cert.pem")
        config = (DEPLOY / "mosquitto.conf").read_text().replace("/etc/mosquitto/", f"{folder}/")
        super().__init__(folder, [])
        lines = config.replace("listener 1883", f"listener {self.port}").replace(
            "listener 8883", f"listener {self.tls_port}"
        )
        self._lines = ["user root", "log_dest stderr", *lines.splitlines()]


class User:
    """Somebody with a password, over TLS: publishes, and hears what is delivered."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.refusals: list[str] = []
        self.heard: list[Arrived] = []
        self._broker = broker
        self._name = name
        broker.on_refused = lambda message, why: self.refusals.append(why)

    async def ask(self, at: str | None = None, reply: str | None = None, **message: Any) -> None:
        """Publish a request and wait until the broker says what it thinks of that."""
        topic, answers = f"{ROOT}/request/{at or self._name}", f"{ROOT}/reply/{reply or self._name}/phone"
        payload = orjson.dumps(message or REQUEST)
        self._broker.post(Outgoing(topic, payload, qos=1, response_topic=answers))
        await self._broker.acknowledged()

    async def until_done(self) -> dict[str, Any]:
        async for arrived in self._broker.arrivals():
            self.heard.append(arrived)
            frame: dict[str, Any] = orjson.loads(arrived.payload)
            if frame["type"] == "done":
                return frame
        raise AssertionError("nothing more is heard")


@contextlib.asynccontextmanager
async def user(broker: Secured, name: str, topic: str = "#") -> AsyncIterator[User]:
    at = address(f"mqtts://{name}@localhost:{broker.tls_port}", f"{name}'s", broker.ca)
    async with Broker(at, name, 1 << 20) as connection:
        await connection.listen(topic)
        yield User(connection, name)


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Secured]:
    broker = Secured(tmp_path)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


@contextlib.asynccontextmanager
async def face_at(url: str, password: str, ca: str = "", **files: str) -> AsyncIterator[tuple[ScriptedModel, Face]]:
    """Serve with a broker that wants to know who comes."""
    async with scripted() as (server, model):
        told = partial(overview, server.server.state, server.models)
        at = address(url, password or None, ca, **files)
        async with Face(at, Topics(ROOT), server.server, Keys({}), dispatcher(server.models), told) as face:
            yield model, face


# The configuration and the access list.


async def test_with_the_deployed_configuration_users_are_answered_over_tls(secured: Secured) -> None:
    async with face_at(f"mqtt://wsserver@127.0.0.1:{secured.port}", "wsserver's") as (model, face):
        await face.listening.wait()
        model.open()
        async with user(secured, "alice") as alice:
            await alice.ask()
            assert (await alice.until_done())["text"] == "hello"
            assert alice.refusals == []


async def test_a_server_connects_over_tls_with_its_password(secured: Secured) -> None:
    url = f"mqtts://wsserver@localhost:{secured.tls_port}"
    async with face_at(url, "wsserver's", secured.ca) as (model, face), user(secured, "alice") as alice:
        await face.listening.wait()
        model.open()
        await alice.ask()
        assert (await alice.until_done())["text"] == "hello"


async def test_nobody_hears_somebody_elses_answers(secured: Secured) -> None:
    async with face_at(f"mqtt://wsserver@127.0.0.1:{secured.port}", "wsserver's") as (model, face):
        await face.listening.wait()
        model.open()
        async with user(secured, "bob") as bob, user(secured, "alice") as alice:
            await alice.ask()
            await alice.until_done()
            await bob.ask()
            await bob.until_done()
            topics = {arrived.topic for arrived in bob.heard}
            assert topics <= {f"{ROOT}/reply/bob/phone", f"{ROOT}/status", f"{ROOT}/events"}


async def test_nobody_asks_in_somebody_elses_name_and_is_told_so(secured: Secured) -> None:
    async with face_at(f"mqtt://wsserver@127.0.0.1:{secured.port}", "wsserver's") as (model, face):
        await face.listening.wait()
        model.open()
        async with user(secured, "bob") as bob, user(secured, "alice") as alice:
            await bob.ask(at="alice", reply="alice")
            assert bob.refusals == ["Not authorized"]
            # In his own name, but to her: the broker cannot know, the server does.
            await bob.ask(reply="alice", type="generate", id="b", prompt="goodbye")
            assert bob.refusals == ["Not authorized"]
            await alice.ask()
            await alice.until_done()
            await bob.ask()
            await bob.until_done()
            assert b"goodbye" not in b"".join(arrived.payload for arrived in alice.heard)
            assert model.steps_of("b") == []


@pytest.mark.parametrize(
    ("name", "password", "why"),
    [("wsserver", "wrong", "Not authorized"), ("nobody", "wrong", "Not authorized"), ("", "", "Not authorized")],
)
async def test_a_server_that_the_broker_does_not_know_says_so_and_goes_on(
    secured: Secured, name: str, password: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    at = f"{name}@" if name else ""
    async with face_at(f"mqtt://{at}127.0.0.1:{secured.port}", password):
        await eventually(lambda: why in caplog.text)
        assert "wrong" not in caplog.text


async def test_what_the_server_may_not_publish_is_logged(secured: Secured, caplog: pytest.LogCaptureFixture) -> None:
    # Who has a password, but not the server's: hears nothing, and may not even say that it is there.
    async with face_at(f"mqtt://stranger@127.0.0.1:{secured.port}", "stranger's"):
        await eventually(lambda: f"did not take a message at '{ROOT}/status': Not authorized" in caplog.text)


# TLS.


async def test_a_broker_whose_certificate_nobody_knows_is_not_talked_to(
    secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    async with face_at(f"mqtts://wsserver@localhost:{secured.tls_port}", "wsserver's"):
        await eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)


async def test_a_certificate_may_stand_for_a_password(tmp_path: Path) -> None:
    broker_cert, broker_key = make(tmp_path)
    client_cert, client_key = make(tmp_path / "client")
    lines = [
        f"certfile {broker_cert}",
        f"keyfile {broker_key}",
        f"cafile {client_cert}",
        "require_certificate true",
        "use_identity_as_username true",
        *OPEN[1:],
    ]
    async with mosquitto(tmp_path, lines) as broker:
        url = f"mqtts://localhost:{broker.port}"
        async with face_at(url, "", broker_cert, certificate=client_cert, key=client_key) as (_, face):
            await face.listening.wait()
            assert "u'localhost'" in broker.log  # the name in the certificate
        async with face_at(url, "", broker_cert) as (_, face):
            await eventually(lambda: "peer did not return a certificate" in broker.log)
            assert not face.listening.is_set()


# Keys.

KEYS = {"alice": digest("alice's key"), "bob": digest("bob's key")}


async def ask(client: Device, token: str | None, in_payload: bool, **message: Any) -> None:
    """Publish a request with a key in its payload or beside it."""
    client.checker.sent(message)
    payload = orjson.dumps(message | {"token": token} if in_payload else message)
    await client.publish(f"{ROOT}/request", payload, token=None if in_payload else token)


@pytest.mark.parametrize("in_payload", [True, False])
async def test_a_key_is_shown_with_every_message(broker: Mosquitto, in_payload: bool) -> None:
    async with serving(broker, Keys(KEYS)) as (_, model, _), device(broker) as client:
        model.open()
        await ask(client, "alice's key", in_payload, **REQUEST)
        assert (await client.until("done"))["text"] == "hello"
        await ask(client, None, in_payload, **REQUEST | {"id": "g2"})
        assert (await client.until("done"))["error"]["code"] == "unauthenticated"
        await ask(client, "a wrong key", in_payload, **REQUEST | {"id": "g3"})
        assert (await client.until("done"))["error"]["code"] == "unauthenticated"
        await ask(client, None, in_payload, type="init", id="i", model=ECHO)
        assert (await client.until("error"))["code"] == "unauthenticated"
        assert {id for id in ("g", "g2", "g3") if model.steps_of(id)} == {"g"}


class Counting(Keys):
    """Keys that count how often one is compared."""

    compared = 0

    def whose(self, key: str) -> str | None:
        self.compared += 1
        return super().whose(key)


async def answer(client: Device, kind: str) -> dict[str, Any]:
    """Give the next frame of a kind, unjudged: the checker knows nothing of what the test publishes by itself."""
    while (frame := await client.receive_unjudged())["type"] != kind:
        pass
    return frame


async def guess(client: Device, number: int, at: str = "request", reply: str | None = None) -> None:
    """Publish a wrong key, for an answer at another topic each time unless one is named."""
    message = {"type": "status", "token": f"wrong {number}", "reply_to": reply or f"{ROOT}/reply/guess-{number}"}
    await client.client.publish(f"{ROOT}/{at}", orjson.dumps(message), qos=1)


async def test_wrong_keys_are_counted_together_whatever_topics_they_name(broker: Mosquitto) -> None:
    keys = Counting(KEYS)
    async with serving(broker, keys, max_auth_failures=3), device(broker) as known, device(broker, "guesser") as guesser:
        await ask(known, "alice's key", True, type="status")
        await answer(known, "status")
        for number in range(50):
            await guess(guesser, number)
        # The right key of one that is not known is what a guess would find out.
        await ask(guesser, "alice's key", True, type="status")
        error = await answer(guesser, "error")
        assert (error["code"], 0 < error["retry_after_ms"] <= 60_000) == ("rate_limited", True)
        assert keys.compared == 1 + 3
        # Who has shown a right key goes on, and so does a user who guesses nothing.
        await ask(known, "alice's key", True, type="status")
        await answer(known, "status")
        async with device(broker, "carol/phone") as carol:
            await carol.publish(f"{ROOT}/request/carol", orjson.dumps({"type": "status", "token": "bob's key"}))
            await answer(carol, "status")


async def test_a_user_who_guesses_is_refused_though_the_name_is_known(broker: Mosquitto) -> None:
    keys = Counting(KEYS)
    async with serving(broker, keys, max_auth_failures=3), device(broker, "carol/phone") as carol:
        request = f"{ROOT}/request/carol"
        await carol.publish(request, orjson.dumps({"type": "status", "token": "bob's key"}))
        await answer(carol, "status")
        for number in range(5):
            await guess(carol, number, "request/carol", f"{ROOT}/reply/carol/other-{number}")
        await carol.publish(request, orjson.dumps({"type": "status", "token": "bob's key"}))
        assert (await answer(carol, "error"))["code"] == "rate_limited"
        assert keys.compared == 1 + 3


async def test_another_key_cannot_cancel_at_the_same_topic(broker: Mosquitto) -> None:
    async with serving(broker, Keys(KEYS)) as (_, model, _), device(broker) as client:
        await ask(client, "alice's key", True, **REQUEST)
        await client.until("started")
        await client.publish(f"{ROOT}/cancel", b'{"type":"cancel","id":"g","token":"bob\'s key"}')
        error = await client.receive_unjudged()
        assert (error["type"], error["code"]) == ("error", "not_active")
        model.open()
        assert (await client.until("done"))["finish_reason"] == "stop"


async def test_a_key_has_its_limits_on_both_sides_together(broker: Mosquitto) -> None:
    async with serving(broker, Keys(KEYS), max_requests_per_key=1) as (server, model, _), device(broker) as client:
        headers = {"Authorization": "Bearer alice's key"}
        async with server.client(additional_headers=headers) as beside:
            await beside.send(**REQUEST)
            await beside.until("started")
            await ask(client, "alice's key", True, **REQUEST)
            assert (await client.until("done"))["error"]["code"] == "overloaded"
            await ask(client, "bob's key", True, **REQUEST)
            model.open()
            assert (await client.until("done"))["finish_reason"] == "stop"
            await beside.until("done")


# Limits.


@pytest.mark.parametrize("keys", [None, Keys(KEYS)], ids=["without keys", "without a key"])
async def test_a_flood_is_dropped_unread_but_for_its_rate_and_others_are_answered(
    broker: Mosquitto, keys: Keys | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with (
        serving(broker, keys, messages_per_second=1.0),
        device(broker, "mallory") as mallory,
        device(broker, "carol/phone") as carol,
    ):
        caplog.clear()
        for _ in range(400):
            await mallory.publish(f"{ROOT}/request", b'{"type":"status"}')
        await carol.publish(f"{ROOT}/request/carol", orjson.dumps({"type": "status", "token": "bob's key"}))
        await answer(carol, "status")

        def dropped() -> int:
            found = [
                re.fullmatch(r"mqtt: ([0-9]+) messages came too fast and were dropped", line) for line in caplog.messages
            ]
            return sum(int(match[1]) for match in found if match)

        # Ten come at once, and one a second after that; one a second of the others is told so. Seconds pass slowly here.
        await eventually(lambda: dropped() > 300)
        lines = [record for record in caplog.records if record.name.startswith("wsserver")]
        assert len(lines) < 30


async def test_a_flood_of_requests_does_not_hold_up_a_cancel(broker: Mosquitto) -> None:
    async with serving(broker, messages_per_second=0.1), device(broker) as client:
        for _ in range(5):
            await client.publish(f"{ROOT}/request", b'{"type":"status"}')
        assert (await answer(client, "error"))["code"] == "rate_limited"
        await client.publish(f"{ROOT}/cancel", b'{"type":"cancel","id":"g"}')
        assert (await answer(client, "error"))["code"] == "not_active", "it was looked at"


async def test_what_can_not_be_answered_is_bounded_too(broker: Mosquitto, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving(broker, messages_per_second=0.5), device(broker, modern=False) as client:
        for number in range(200):
            await client.client.publish(f"{ROOT}/request", f"no answer {number}".encode(), qos=1)
        await eventually(lambda: any("were dropped" in line for line in caplog.messages))
        assert len([line for line in caplog.messages if "is not answered" in line]) < 30


async def test_messages_that_come_too_fast_are_refused(broker: Mosquitto) -> None:
    async with serving(broker, messages_per_second=0.1) as (_, _, _), device(broker) as client:
        await client.send(type="status")
        await client.send(type="status")
        assert {(await client.receive())["type"] for _ in range(2)} == {"status", "error"}


async def test_topics_for_answers_are_bounded_and_idle_ones_make_room(broker: Mosquitto) -> None:
    async with serving(broker, max_connections_per_address=2) as (_, model, _), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(device(broker, f"client-{number}")) for number in range(4)]
        await clients[0].settle()
        for client in clients[1:3]:
            await client.send(**REQUEST)
            await client.settle()
        await clients[3].send(**REQUEST)
        assert (await clients[3].until("done"))["error"]["code"] == "overloaded"
        model.open()
        for client in clients[1:3]:
            await client.until("done")
        assert (await clients[3].generate(id="again", prompt="hello"))["text"] == "hello"


async def test_new_topics_for_answers_come_at_the_pace_of_handshakes(broker: Mosquitto) -> None:
    async with serving(broker, handshakes_per_second=0.1), device(broker) as client, device(broker, "other") as other:
        await client.settle()
        done = await other.generate(id="g", prompt="hello")
        assert done["error"]["code"] == "rate_limited"
        assert 0 < done["error"]["retry_after_ms"] <= 10_000


# The command line.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mqtt-url", "mqtt://broker.example.com"], "anybody who may publish on broker.example.com"),
        (["--mqtt-url", "http://127.0.0.1"], "is no broker's"),
        (["--mqtt-url", "mqtt://me:secret@127.0.0.1"], "WSSERVER_MQTT_PASSWORD"),
        (["--mqtt-url", "mqtt://127.0.0.1", "--mqtt-root", "a/#"], "--mqtt-root"),
        (["--mqtt-url", "mqtt://127.0.0.1", "--mqtt-ca", "pyproject.toml"], "mqtts://"),
    ],
)
async def test_a_setting_that_cannot_be_is_told_in_a_line(tmp_path: Path, options: list[str], words: str) -> None:
    code, stderr = await failed(tmp_path, *ON_ECHO, *options)
    assert code == 1
    assert words in stderr
    assert stderr.count("\n") == 1


async def test_without_the_extra_a_broker_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "aiomqtt.py").write_text("raise ImportError('not installed')")
    environment = {"PYTHONPATH": str(tmp_path)}
    async with process(tmp_path, *COMMAND, *ON_ECHO, "--mqtt-url", "mqtt://127.0.0.1", **environment) as running:
        assert await running.ends() == 1
        assert 'pip install "wsserver[mqtt]"' in running.stderr


async def test_the_password_is_not_passed_on(secured: Secured, tmp_path: Path) -> None:
    options = ["--mqtt-url", f"mqtt://wsserver@127.0.0.1:{secured.port}", "--mqtt-root", ROOT, "--log-level", "debug"]
    async with process(tmp_path, *COMMAND, *ON_ECHO, *options, WSSERVER_MQTT_PASSWORD="wsserver's") as running:
        await running.says()
        async with user(secured, "alice", f"{ROOT}/status") as alice:
            async with asyncio.timeout(20):
                await anext(alice._broker.arrivals())
        assert "wsserver's" not in running.stderr
