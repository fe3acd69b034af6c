"""The contract's rules as a judge beside the wire: it is told what a client sent and what it received, and objects.

Written from protocol.md, without looking at the session: the two must agree by themselves. What the server has read is known
where it answers in order: the reply to a status says that everything sent before it was read, and what was open just then.
A generation that outlives its connection goes on with the next one's checker, which shares what the first has seen of it.
"""

import itertools
import json
from typing import Any

from tests.asked import Asked, Resumable

# What may come after what, for one generation or one load.
FOLLOWERS = {
    "nothing": {"queued", "started", "done", "loading", "ready"},
    "queued": {"queued", "started", "done"},
    "started": {"prefill", "token", "done", "detached"},
    "prefill": {"prefill", "token", "done", "detached"},
    "token": {"token", "done", "detached"},
    "resumed": {"prefill", "token", "done", "detached"},
    "loading": {"loading", "ready"},
}
HIDDEN = 32  # tokens without text that are told in a frame of their own
OF_LOAD = {"loading", "ready"}
OF_GENERATION = {"queued", "started", "prefill", "token", "done", "detached"}
# What may be said to a message when it is read.
REFUSALS = {"bad_message", "duplicate_id", "rate_limited", "overloaded", "shutting_down"}
FINISH_REASONS = {"stop", "length", "cancelled", "timeout", "shutdown", "error"}


class Checker:
    """Follows one connection. `sent` and `received` raise AssertionError at the first broken rule."""

    def __init__(self, resumable: Resumable | None = None) -> None:
        # Shared by the checkers of connections that resume each other's generations.
        self.resumable: Resumable = {} if resumable is None else resumable
        # For each id what was sent and has no end yet, oldest first: the first is open, the others are duplicates or early.
        self.open: dict[str, list[Asked]] = {}
        self.unnamed: list[Asked] = []
        self._to_be_named: list[Asked] = []
        self.texts: dict[str, str] = {}
        self.scored: dict[str, list[dict[str, Any]]] = {}
        self.dones: list[dict[str, Any]] = []
        self.ended: list[Asked] = []
        self._serials = itertools.count()
        self._resumes: dict[str, list[tuple[int, dict[str, Any]]]] = {}  # sent and not answered yet
        self._statuses: list[int] = []
        self._cancels: list[tuple[int, str | None]] = []
        self._nameless: int = 0  # sent without a type or with an impossible id, so that the answer names nothing
        self._going_away = False

    def sent(self, message: dict[str, Any]) -> None:
        kind, id, serial = message.get("type"), message.get("id"), next(self._serials)
        if kind == "status":
            self._statuses.append(serial)
        elif (
            not isinstance(kind, str)
            or (kind == "resume" and id is None)
            or not (id is None or (isinstance(id, str) and 1 <= len(id) <= 128))
        ):
            self._nameless += 1
        elif kind in ("generate", "init"):
            asked = Asked(serial, message)
            if id is None:
                self.unnamed.append(asked)
                self._to_be_named.append(asked)
            else:
                self.open.setdefault(id, []).append(asked)
        elif kind == "resume":
            self._resumes.setdefault(message["id"], []).append((serial, message))
        elif kind == "cancel":
            self._cancels.append((serial, id))
            for (whose, _), known in self.resumable.items():
                if id in (None, whose):
                    known.seen.cancelled = True
            for asked in self._pending(id):
                asked.cancels_sent.append(serial)

    def _pending(self, id: str | None) -> list[Asked]:
        if id is not None:
            return self.open.get(id, [])
        return [*itertools.chain(*self.open.values()), *self.unnamed]

    def received(self, text: str) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(text)
        assert isinstance(frame, dict), f"a frame that is no object: {text}"
        kind = frame["type"]
        if kind in OF_LOAD | OF_GENERATION:
            self._of_open_id(kind, frame)
        elif kind == "resumed":
            self._resumed(frame)
        elif kind == "error":
            self._error(frame.get("id"), frame["code"], frame)
        elif kind == "status":
            self._status(frame)
        else:
            assert kind == "goaway", f"a frame of unknown type: {frame}"
            assert not self._going_away, "a second goaway"
            self._going_away = True
        return frame

    def quiet(self) -> None:
        """Object if anything that was asked has no end yet."""
        assert not self.open_questions(), f"without an end: {self.open_questions()}"

    def open_questions(self) -> list[Any]:
        """Give what was asked and has no end yet."""
        return [*self._pending(None), *itertools.chain(*self._resumes.values()), *self._statuses]

    def _of_open_id(self, kind: str, frame: dict[str, Any]) -> None:
        asked = self._asked(kind, frame)
        assert kind in FOLLOWERS[asked.last], f"{kind} after {asked.last}: {frame}"
        overtaken = asked.cancel_was_read and kind not in ("done", "detached")
        assert not overtaken, f"the cancel had been read when this was sent: {frame}"
        asked.last = kind
        match kind:
            case "queued":
                assert frame["position"] >= 1, f"no place in a line: {frame}"
            case "started":
                self._started(asked, frame)
            case "prefill":
                assert 0 < frame["done"] < frame["total"], f"no progress: {frame}"
            case "loading":
                assert 0 <= frame["progress"] <= 1, f"no progress: {frame}"
            case "token":
                self._token(asked, frame)
            case "done":
                self._done(asked, frame)
            case "detached":
                assert asked.message.get("resumable"), f"detached, but nobody could resume it: {frame}"
                self._end(frame["id"], 0)
            case "ready":
                self._end(frame["id"], 0)

    def _asked(self, kind: str, frame: dict[str, Any]) -> Asked:
        id = frame.get("id")
        assert isinstance(id, str), f"a frame without id: {frame}"
        wanted = "init" if kind in OF_LOAD else "generate"
        if id not in self.open and id.startswith("auto-"):
            self._name(id, wanted)
        assert id in self.open, f"a frame for an id that is not open: {frame}"
        asked = self.open[id][0]
        assert asked.kind == wanted, f"{kind} answers {asked.message}"
        return asked

    def _name(self, id: str, wanted: str) -> None:
        # Ids are assigned in the order of reading, but pass by those the client uses itself.
        nth = self._to_be_named[int(id.removeprefix("auto-")) - 1 :]
        asked = next((a for a in [*nth, *self.unnamed] if a in self.unnamed and a.kind == wanted), None)
        assert asked, f"a frame for nothing that was asked: {id}"
        self.unnamed.remove(asked)
        self.open[id] = [asked]

    def _started(self, asked: Asked, frame: dict[str, Any]) -> None:
        token = frame.get("resume_token")
        assert bool(token) == bool(asked.message.get("resumable")), (
            f"a resume_token unasked for, or asked for in vain: {frame}"
        )
        if token:
            self.resumable[frame["id"], token] = asked

    def _resumed(self, frame: dict[str, Any]) -> None:
        id, seq = frame["id"], frame["seq"]
        assert id not in self.open or self.open[id][0].last == "nothing", f"resumed what is active here: {frame}"
        serial, message = self._answered_resume(id, frame)
        key = (id, message["resume_token"])
        assert key in self.resumable, f"resumed with a token that nobody was given: {frame}"
        assert seq == message.get("after_seq", 0), f"resumed elsewhere than asked: {frame}"
        cancels = [at for at, whose in self._cancels if whose in (id, None) and at > serial]
        asked = self.resumable[key] = self.resumable[key].resumed(serial, seq, cancels)
        self.open.setdefault(id, []).insert(0, asked)

    def _answered_resume(self, id: str, frame: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert self._resumes.get(id), f"an answer to a resume that was not sent: {frame}"
        answered = self._resumes[id].pop(0)
        if not self._resumes[id]:
            del self._resumes[id]
        return answered

    def _token(self, asked: Asked, frame: dict[str, Any]) -> None:
        assert asked.message.get("stream") is not False, f"a token of an answer that was not to be streamed: {frame}"
        assert frame["seq"] == asked.next_seq, f"a gap or a double: {frame}, expected seq {asked.next_seq}"
        assert frame["n"] >= 1, f"a token frame of nothing: {frame}"
        assert frame["text"] or frame["n"] >= HIDDEN, f"an empty token frame: {frame}"
        wanted, entries = asked.message.get("logprobs"), frame.get("logprobs")
        assert (entries is None) == (wanted is None), f"logprobs unasked for, or asked for in vain: {frame}"
        if entries is not None:
            assert len(entries) == frame["n"], f"not one logprob for each token: {frame}"
            for entry in entries:
                _scored(entry, wanted)
            asked.scored += entries
        asked.grew(asked.next_seq + frame["n"], frame["text"])

    def _done(self, asked: Asked, frame: dict[str, Any]) -> None:
        reason, usage = frame["finish_reason"], frame["usage"]
        assert reason in FINISH_REASONS, f"no such reason: {frame}"
        assert (reason == "error") == ("error" in frame), f"error and finish_reason disagree: {frame}"
        assert asked.next_seq <= usage["completion_tokens"], f"more tokens sent than made: {frame}"
        assert (reason == "cancelled") == ("cancel_ms" in frame["timings"]), f"cancel_ms without a cancel: {frame}"
        wanted = asked.cancels_sent or asked.seen.cancelled
        assert reason != "cancelled" or wanted, f"cancelled by nobody: {frame}"
        assert reason != "shutdown" or self._going_away, f"shutdown without goaway: {frame}"
        assert reason in ("cancelled", "shutdown") or not asked.cancel_was_read, f"the cancel had been read: {frame}"
        assert all(ms >= 0 for ms in frame["timings"].values()), f"time runs backwards: {frame}"
        whole = asked.message.get("stream") is False
        assert whole or not {"text", "logprobs"} & frame.keys(), f"what came in token frames comes again: {frame}"
        for entry in frame.get("logprobs", ()):
            _scored(entry, asked.message["logprobs"])
        asked.done = frame
        self.texts[frame["id"]], self.scored[frame["id"]] = asked.text, asked.scored
        self.dones.append(frame)
        self._end(frame["id"], 0)

    def _error(self, id: str | None, code: str, frame: dict[str, Any]) -> None:
        if code == "not_active":
            self._not_active(id, frame)
        elif id is not None and self._answers_resume(id, code, frame):
            self._answered_resume(id, frame)
        elif id is not None:
            if id not in self.open and id.startswith("auto-"):
                self._name(id, "init")
            assert id in self.open, f"an error about nothing that was sent: {frame}"
            self._end(id, self._place_of_error(self.open[id], code, frame))
        elif code not in ("bad_json", "unknown_type"):
            if code == "bad_message" and self._nameless:
                self._nameless -= 1
                return
            if code == "rate_limited" and self._statuses:
                del self._statuses[0]
                return
            refused = next((asked for asked in self.unnamed if asked.kind == "init"), None)
            assert refused, f"an error about nothing that was sent: {frame}"
            self.unnamed.remove(refused)
            self._to_be_named.remove(refused)

    def _answers_resume(self, id: str, code: str, frame: dict[str, Any]) -> bool:
        # Ids of generations and of resumes are told apart by what the error says, or by what else it could answer.
        if code == "resume_expired" or frame["message"].startswith(("$.after_seq", "$.resume_token")):
            return True
        if code not in REFUSALS or id not in self._resumes:
            return False
        # Refusals come in the order of reading, and the first of the line is open.
        newcomers = self.open.get(id, [])[1:]
        return not newcomers or self._resumes[id][0][0] < newcomers[0].serial

    def _place_of_error(self, line: list[Asked], code: str, frame: dict[str, Any]) -> int:
        # An error answers a newcomer behind the open one and leaves that alone, or it ends the open one: only a load.
        first, *others = line
        if code == "model_not_found":
            inits = [place for place, asked in enumerate(line) if asked.kind == "init" and asked.last == "nothing"]
            assert inits, f"no init can have asked for this: {frame}"
            return inits[0]
        beside = others and (
            code in ("bad_message", "duplicate_id", "rate_limited") or (code == "unsupported" and first.kind == "generate")
        )
        assert beside or code != "duplicate_id", f"a duplicate of nothing: {frame}"
        assert beside or first.kind == "init", f"an error ended a generation: {frame}"
        return 1 if beside else 0

    def _not_active(self, id: str | None, frame: dict[str, Any]) -> None:
        # A cancel found nothing only if all that was sent before it had its end, and those ends came before this.
        oldest = min((asked.serial for asked in self._pending(id)), default=next(self._serials))
        cancel = next((c for c in self._cancels if c[1] == id and c[0] < oldest), None)
        assert cancel, f"no cancel can have found nothing: {frame}"
        self._cancels.remove(cancel)

    def _end(self, id: str, place: int) -> None:
        self.ended.append(self.open[id].pop(place))
        if not self.open[id]:
            del self.open[id]

    def _status(self, frame: dict[str, Any]) -> None:
        assert self._statuses, "a status that nobody asked for"
        serial = self._statuses.pop(0)
        late = [message for at, message in itertools.chain(*self._resumes.values()) if at < serial]
        assert not late, f"a resume went unanswered: {late}"
        read = {id: [a for a in line if a.serial < serial] for id, line in self.open.items()}
        unnamed = [a for a in self.unnamed if a.serial < serial]
        for id, line in read.items():
            assert len(line) <= 1, f"two of one id are open: {id}, or a duplicate went unanswered"
            for asked in line:
                asked.cancel_was_read = asked.cancel_was_read or any(at < serial for at in asked.cancels_sent)
        active = frame["connection"]["active"]
        named = {id for id, line in read.items() if line}
        assert named <= set(active), f"{named - set(active)} are open, but status does not say so: {frame}"
        assert len(active) == len(named) + len(unnamed), f"{sorted(named)} and {len(unnamed)} unnamed are open: {frame}"


def _scored(entry: dict[str, Any], wanted: int) -> None:
    """Object to a token whose log probability, or whose alternatives, cannot be."""
    top = entry.get("top", [])
    assert len(top) <= wanted, f"more alternatives than the {wanted} asked for: {entry}"
    assert "top" not in entry or top, f"alternatives that are none: {entry}"
    for token in (entry, *top):
        fields = {"token_id", "text", "logprob", *(("top",) if token is entry else ())}
        assert {"token_id", "logprob"} <= token.keys() <= fields, f"fields of no token: {entry}"
        assert "\ufffd" not in token.get("text", ""), f"half a character: {entry}"
        assert token["token_id"] >= 0, f"no token: {entry}"
        assert -9999 <= token["logprob"] <= 0, f"no log probability: {entry}"
    told = {token["token_id"]: token for token in top}
    assert len(told) == len(top), f"an alternative twice: {entry}"
    logprobs = [token["logprob"] for token in top]
    assert logprobs == sorted(logprobs, reverse=True), f"not the likeliest first: {entry}"
    own = {name: value for name, value in entry.items() if name != "top"}
    if len(top) == wanted > 0:
        assert own["token_id"] in told or own["logprob"] <= logprobs[-1], f"likelier than the likeliest: {entry}"
    assert told.get(own["token_id"], own) == own, f"two opinions of one token: {entry}"
