"""Whatever clients do in whatever order, and whichever step runs when, the contract holds."""

import asyncio
import contextlib
import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from tests.asked import Asked, Resumable
from tests.checker import Checker
from tests.conftest import ECHO, Client, Running, eventually
from tests.scripted import WIDE, HastyClock, ScriptedModel, put, scripted, slow_client
from wsserver.outbox import Outbox

OTHER = "test/other"
OUTBOX_BYTES = Outbox().max_bytes
NONSENSE = Frame(Opcode.TEXT, b"{").serialize(mask=True)


class Died(BaseException):
    pass


class Peer:
    """One client of the walk: its frames are read by a task, when reading is not paused."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._reader = asyncio.create_task(self._read())
        self.asked_for = 0  # characters

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.client.receive()

    @property
    def gone(self) -> bool:
        return self._reader.done()

    def pause(self) -> None:
        self.client.socket.transport.pause_reading()

    def resume(self) -> None:
        self.client.socket.transport.resume_reading()

    async def leave(self) -> None:
        """Hang up, and see that the server had not done so; it may do that only to one who asked for too much."""
        self.client.socket.transport.abort()
        await self._reader
        code = self.client.socket.close_code
        assert code == 1006 or (code == 4413 and self.asked_for > OUTBOX_BYTES / 2), f"closed with {code} for no reason"

    async def settled(self) -> None:
        """Wait until everything has its end, or the connection."""
        await eventually(lambda: self.gone or not self.client.checker.open_questions())
        await self.ask(type="status")
        await eventually(lambda: self.gone or not self.client.checker.open_questions())
        assert self.gone or self.client.frames[-1]["connection"]["active"] == []

    async def ask(self, **message: Any) -> None:
        if message["type"] == "generate":
            self.asked_for += len(answer_to(message)[0])
        elif message["type"] == "resume":
            asked = self.client.checker.resumable[message["id"], message["resume_token"]]
            self.asked_for += len(answer_to(asked.message)[0])
        with contextlib.suppress(ConnectionClosed):
            await self.client.send(**message)


@dataclass
class Walk:
    """A server with two scripted models, and the clients that walk."""

    server: Running
    models: dict[str, ScriptedModel]
    peers: list[Peer]
    stack: contextlib.AsyncExitStack
    serials: "itertools.count[int]" = field(default_factory=itertools.count)
    checkers: list[Checker] = field(default_factory=list)  # of all clients there ever were

    async def connect(self) -> Peer:
        peer = Peer(await self.stack.enter_async_context(slow_client(self.server)))
        self.stack.push_async_callback(peer.leave)
        self.checkers.append(peer.client.checker)
        return peer

    async def take_up(self, peer: Peer, nth: int, place: int) -> None:
        """Resume what got a token, the newest first, from any place where some frame of it ended."""
        keys = list(self.server.resumable)
        if keys:
            id, token = keys[-1 - nth % len(keys)]
            borders = list(self.server.resumable[id, token].seen.borders)
            seq = borders[-1 - place % len(borders)]
            await peer.ask(type="resume", id=id, resume_token=token, after_seq=seq)

    async def go(self, step: tuple[Any, ...]) -> None:
        match step:
            case "steps", str(model), int(permits):
                self.models[model].step_gate.let(permits)
            case "loads", int(permits):
                self.models[OTHER].load_gate.let(permits)
            case "turns", int(turns):
                for _ in range(turns):
                    await asyncio.sleep(0)
            case "fails", str(model), error, int(ahead):
                number = len(self.models[model].steps) + ahead
                self.models[model].step_errors[number] = error("a step failed")
            case ("load fails",):
                self.models[OTHER].load_errors.append(OSError("a load failed"))
            case int(number), *action:
                await self.act(number % len(self.peers), *action)

    async def act(self, number: int, action: str, fields: dict[str, Any]) -> None:
        peer = self.peers[number]
        if action == "leave" or peer.gone:
            await peer.leave()
            self.peers[number] = await self.connect()
        elif action == "pause":
            peer.pause()
        elif action == "resume":
            peer.resume()
        elif action == "take up":
            for _ in range(100):  # what has just been asked for may have begun by then
                await asyncio.sleep(0)
            await self.take_up(peer, fields["nth"], fields["place"])
        elif action == "drown":
            peer.pause()
            await peer.ask(type="generate", **self.filled("generate", fields))
        elif action == "nonsense":
            peer.client.socket.transport.write(NONSENSE)
        else:
            await peer.ask(type=action, **self.filled(action, fields))
            if action == "cancel":
                await peer.ask(type="status")  # the answer tells the judge that the cancel was read

    async def finish(self) -> None:
        """Let everything run, and look at every answer that came to its end."""
        for model in self.models.values():
            model.open()
        for peer in self.peers:
            peer.resume()
        for peer in self.peers:
            await peer.settled()
        # Whatever was resumable still is, and comes to the end it has or will have.
        last = Peer(await self.stack.enter_async_context(self.server.client()))
        self.stack.push_async_callback(last.leave)
        for nth in range(len(self.server.resumable)):
            await self.take_up(last, nth, 0)
            await last.settled()
        for checker in [*self.checkers, last.client.checker]:
            for asked in checker.ended:
                if asked.done:
                    check_answer(asked)

    def filled(self, action: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Make every prompt another one, so that nobody can get anybody else's text unnoticed."""
        if action != "generate":
            return fields
        return {**fields, "prompt": f"{next(self.serials)}:{fields['prompt']}"}


def answer_to(message: dict[str, Any]) -> tuple[str, str]:
    """Give the text and the finish reason that an echo of this prompt has to have."""
    prompt, limit = message["prompt"], message.get("max_tokens", math.inf)
    if "ignore_eos" in message:
        tokens = [*prompt.replace(WIDE, ""), *[WIDE] * prompt.count(WIDE), ""]
        return "".join(itertools.islice(itertools.cycle(tokens), limit)), "length"
    return (prompt, "stop") if limit > len(prompt) else (prompt[:limit], "length")


def check_answer(asked: Asked) -> None:
    assert asked.done
    text = asked.done.get("text", "") if asked.message.get("stream") is False else asked.text
    whole, natural_end = answer_to(asked.message)
    match asked.done["finish_reason"]:
        case "error":
            assert asked.done["error"]["code"] in ("load_failed", "internal")
            assert whole.startswith(text)
        case "cancelled":
            assert whole.startswith(text)
        case reason:
            assert (text, reason) == (whole, natural_end)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


who = st.integers(0, 2)
ids = st.sampled_from(["a", "b", "c"])
which = st.sampled_from([ECHO, OTHER])
prompts = st.sampled_from(["", "x", "é😀漢", "hello world " * 3, "y" * 300, "z" * 1100, WIDE * 12])
named = st.fixed_dictionaries({"prompt": prompts, "id": ids}, optional={"stream": st.booleans(), "resumable": st.booleans()})
resumables = st.fixed_dictionaries({"prompt": prompts, "id": ids, "resumable": st.just(True)})
taken_up = st.fixed_dictionaries({"nth": st.integers(0, 9), "place": st.integers(0, 9)})
logprobs = st.integers(0, 20)
unnamed = st.fixed_dictionaries({"prompt": prompts}, optional={"logprobs": logprobs})
limited = st.fixed_dictionaries(
    {"prompt": st.just("xyz" * 9), "id": ids, "max_tokens": st.integers(1, 40)}, optional={"logprobs": logprobs}
)
flood = st.fixed_dictionaries(
    {"prompt": st.just(WIDE * 12), "id": st.just("flood"), "ignore_eos": st.just(True), "max_tokens": st.just(400)},
    optional={"resumable": st.booleans()},
)
moves = st.one_of(
    st.tuples(who, st.just("generate"), named),
    st.tuples(who, st.just("generate"), unnamed | limited),
    st.tuples(who, st.sampled_from(["generate", "drown"]), flood),
    st.tuples(who, st.just("cancel"), st.fixed_dictionaries({"id": ids})),
    st.tuples(who, st.just("generate"), resumables),
    st.tuples(who, st.just("take up"), taken_up),
    st.tuples(who, st.just("take up"), st.just({"nth": 0, "place": 0})),
    st.tuples(who, st.just("leave"), st.just({})),
    st.tuples(who, st.just("cancel"), optional(id=st.sampled_from(["flood", "nobody"]))),
    st.tuples(who, st.just("init"), optional(id=ids, model=which)),
    st.tuples(who, st.just("init"), st.fixed_dictionaries({"model": which, "id": ids})),
    st.tuples(who, st.sampled_from(["status", "nonsense", "pause", "resume", "leave"]), st.just({})),
    st.tuples(st.just("steps"), which, st.integers(1, 3) | st.integers(4, 40)),
    st.tuples(st.just("steps"), which, st.just(1) | st.just(500)),
    st.tuples(st.just("loads"), st.integers(1, 3)),
    st.tuples(st.just("turns"), st.sampled_from([1, 3, 30])),
    st.tuples(st.just("fails"), which, st.sampled_from([RuntimeError, Died]), st.integers(1, 20)),
    st.tuples(st.just("load fails")),
)


# Not made smaller when it fails: walks fail by the threads' timing, and each try of one that waits in vain takes long.
@settings(max_examples=120, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(steps=st.lists(moves, min_size=8, max_size=50), clients=st.integers(1, 3), max_active=st.integers(1, 3))
async def test_the_contract_holds_on_every_walk(steps: list[tuple[Any, ...]], clients: int, max_active: int) -> None:
    async with scripted(max_active=max_active) as (server, echo):
        models = {ECHO: echo, OTHER: put(server.models, OTHER)}
        models[OTHER].load_gate.shut()
        server.models._clock = HastyClock()  # engines that died are loaded anew at once
        tasks = asyncio.all_tasks()
        async with contextlib.AsyncExitStack() as stack:
            walk = Walk(server, models, [], stack)
            walk.peers += [await walk.connect() for _ in range(clients)]
            for step in steps:
                await walk.go(step)
            await walk.finish()
        await eventually(lambda: asyncio.all_tasks() <= tasks)
        await eventually(lambda: not any(entry["active"] or entry["queued"] for entry in server.models.status()))
        for entry in server.models.status():
            # An engine that died keeps its ids; the next load starts without them.
            await eventually(lambda entry=entry: entry["state"] == "failed" or not models[entry["id"]].held())


G = {"type": "generate", "id": "g", "prompt": "hello"}
STARTED = {"type": "started", "id": "g", "model": "m", "prompt_tokens": 5, "cached_tokens": 0}
USAGE = {"prompt_tokens": 5, "completion_tokens": 5, "cached_tokens": 0}
DONE = {"type": "done", "id": "g", "finish_reason": "stop", "usage": USAGE, "timings": {"total_ms": 1.0}}
CANCELLED = {**DONE, "finish_reason": "cancelled", "timings": {"total_ms": 1.0, "cancel_ms": 0.5}}
INIT = {"type": "init", "id": "g"}
READY = {"type": "ready", "id": "g"}
CANCEL = {"type": "cancel", "id": "g"}


def token(seq: int, n: int = 1, text: str = "x") -> dict[str, Any]:
    return {"type": "token", "id": "g", "seq": seq, "n": n, "text": text}


def error(code: str, **fields: str) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": "", **fields}


def status(*active: str) -> dict[str, Any]:
    return {"type": "status", "connection": {"session": "s", "active": list(active)}}


# What was sent, what came, and what the judge has to say of it.
BROKEN = [
    ([], [DONE], "not open"),
    ([G], [DONE, DONE], "not open"),
    ([G], [STARTED, DONE, token(0)], "not open"),
    ([G], [token(0)], "token after nothing"),
    ([G], [STARTED, STARTED], "started after started"),
    ([G], [STARTED, token(0), {"type": "queued", "id": "g", "position": 1}], "queued after token"),
    ([G], [{"type": "queued", "id": "g", "position": 0}], "no place"),
    ([G], [STARTED, token(1)], "gap"),
    ([G], [STARTED, token(0, n=2), token(1)], "gap"),
    ([G], [STARTED, token(0, n=0)], "of nothing"),
    ([G], [STARTED, token(0, text="")], "empty"),
    ([{**G, "stream": False}], [STARTED, token(0)], "not to be streamed"),
    ([G], [STARTED, token(0, n=6), DONE], "more tokens"),
    ([G], [{**DONE, "finish_reason": "error"}], "disagree"),
    ([G], [{**DONE, "finish_reason": "bored"}], "no such reason"),
    ([G], [CANCELLED], "by nobody"),
    ([G, CANCEL], [{**DONE, "finish_reason": "cancelled"}], "cancel_ms"),
    ([G], [{**DONE, "finish_reason": "shutdown"}], "without goaway"),
    ([G], [{**DONE, "timings": {"total_ms": -1.0}}], "backwards"),
    ([G], [READY], "answers"),
    ([INIT], [DONE], "answers"),
    ([INIT], [READY, READY], "not open"),
    ([{**G, "id": None}], [{**DONE, "id": "auto-1"}, {**DONE, "id": "auto-2"}], "nothing that was asked"),
    ([G], [error("internal", id="g")], "ended a generation"),
    ([G], [error("bad_message", id="g")], "ended a generation"),
    ([G], [error("duplicate_id", id="g")], "duplicate of nothing"),
    ([], [error("bad_message", id="g")], "nothing that was sent"),
    ([], [error("model_not_found")], "nothing that was sent"),
    ([G, CANCEL], [error("not_active", id="g")], "found nothing"),
    ([], [error("not_active", id="g")], "found nothing"),
    ([CANCEL], [error("not_active", id="g")] * 2, "found nothing"),
    ([G, {"type": "cancel"}], [error("not_active")], "found nothing"),
    ([G, CANCEL, {"type": "status"}], [STARTED, status("g"), token(0)], "had been read"),
    ([G, CANCEL, {"type": "status"}], [status("g"), DONE], "had been read"),
    ([G, {"type": "status"}], [status()], "does not say so"),
    ([G, {"type": "status"}], [DONE, status("g")], "unnamed are open"),
    ([{"type": "status"}], [status("others")], "unnamed are open"),
    ([G, G, {"type": "status"}], [status("g")], "two of one id"),
    ([], [status()], "nobody asked"),
    ([], [{"type": "goaway", "deadline_ms": 1}] * 2, "second goaway"),
    ([], [{"type": "hello"}], "unknown type"),
]
FAIR = [
    ([G], [STARTED, token(0, 2, "he"), token(2, 3, "llo"), DONE]),
    ([G, CANCEL], [STARTED, CANCELLED]),
    ([G, CANCEL], [DONE, error("not_active", id="g")]),
    ([G, CANCEL, CANCEL], [CANCELLED]),
    ([G, G], [error("duplicate_id", id="g"), DONE]),
    ([G, G], [DONE, DONE]),
    ([G, INIT], [DONE, READY]),
    ([INIT, CANCEL], [error("cancelled", id="g")]),
    ([{**G, "id": None}, {"type": "status"}], [status("auto-1"), {**DONE, "id": "auto-1"}]),
    ([G, {"type": "status"}], [status("g"), DONE]),
    ([{"type": "cancel", "id": 7}, {}], [error("bad_message"), error("bad_message"), error("bad_json")]),
]


def judge(sent: list[dict[str, Any]], received: list[dict[str, Any]], resumable: Resumable | None = None) -> Checker:
    checker = Checker(resumable)
    for message in sent:
        checker.sent(message)
    for frame in received:
        checker.received(json.dumps(frame))
    return checker


@pytest.mark.parametrize(("sent", "received", "objection"), BROKEN, ids=range(len(BROKEN)))
def test_the_judge_objects_to_every_broken_rule(
    sent: list[dict[str, Any]], received: list[dict[str, Any]], objection: str
) -> None:
    judge(sent, received[:-1])
    with pytest.raises(AssertionError, match=objection):
        judge(sent, received)


@pytest.mark.parametrize(("sent", "received"), FAIR, ids=range(len(FAIR)))
def test_the_judge_lets_fair_play_pass(sent: list[dict[str, Any]], received: list[dict[str, Any]]) -> None:
    judge(sent, received).quiet()


@pytest.mark.parametrize("sent", [G, {**G, "id": None}, INIT])
def test_the_judge_misses_an_end_that_never_came(sent: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="without an end"):
        judge([sent], []).quiet()
