"""The contract's rules as a judge beside the wire: it is told what a client sent and what it received, and objects.

Written from protocol.md, without looking at the session: the two must agree by themselves. Rules that need to know when the
server read a message (rather than when the client sent it) are checked as far as the client can see them.
"""

import json
from dataclasses import dataclass
from typing import Any

# What may come after what, for one generation.
FOLLOWERS = {
    "nothing": {"queued", "started", "done"},
    "queued": {"queued", "started", "done"},
    "started": {"prefill", "token", "done"},
    "prefill": {"prefill", "token", "done"},
    "token": {"token", "done"},
}


@dataclass
class Generation:
    last: str = "nothing"
    next_seq: int = 0
    text: str = ""
    cancels_sent: int = 0


class Checker:
    """Follows one connection. `sent` and `received` raise AssertionError at the first broken rule."""

    def __init__(self) -> None:
        self.open: dict[str, Generation] = {}
        self.loads: set[str] = set()
        self.texts: dict[str, str] = {}
        self.dones: list[dict[str, Any]] = []
        self.ambiguous: set[str] = set()

    def sent(self, message: dict[str, Any]) -> None:
        kind, id = message.get("type"), message.get("id")
        if kind == "generate" and isinstance(id, str):
            if id in self.open or id in self.loads:
                self.ambiguous.add(id)  # a duplicate, unless the done is on its way
            else:
                self.open[id] = Generation()
        elif kind == "init" and isinstance(id, str):
            self.loads.add(id)
        elif kind == "cancel":
            for open_id in [id] if id is not None else list(self.open):
                if open_id in self.open:
                    self.open[open_id].cancels_sent += 1

    def received(self, text: str) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(text)
        assert isinstance(frame, dict), f"a frame that is no object: {text}"
        kind, id = frame["type"], frame.get("id")
        if kind in ("queued", "started", "prefill", "token", "done"):
            self._of_generation(kind, id, frame)
        elif kind == "ready" or (kind == "error" and frame["code"] != "duplicate_id"):
            self.loads.discard(id)
        return frame

    def _of_generation(self, kind: str, id: str, frame: dict[str, Any]) -> None:
        assert isinstance(id, str), f"a frame without id: {frame}"
        if id not in self.open:
            named_by_server = kind in ("queued", "started", "done") and id.startswith("auto-")
            assert named_by_server or id in self.ambiguous, f"a frame for an id that is not open: {frame}"
            self.open[id] = Generation()
        generation = self.open[id]
        assert kind in FOLLOWERS[generation.last], f"{kind} after {generation.last}: {frame}"
        generation.last = kind
        if kind == "queued":
            assert frame["position"] >= 1
        elif kind == "prefill":
            assert 0 < frame["done"] < frame["total"]
        elif kind == "token":
            self._token(generation, frame)
        elif kind == "done":
            self._done(id, generation, frame)

    def _token(self, generation: Generation, frame: dict[str, Any]) -> None:
        assert frame["seq"] == generation.next_seq, f"a gap or a double: {frame}, expected seq {generation.next_seq}"
        assert frame["n"] >= 1, f"a token frame of nothing: {frame}"
        assert frame["text"], f"an empty token frame: {frame}"
        generation.next_seq += frame["n"]
        generation.text += frame["text"]

    def _done(self, id: str, generation: Generation, frame: dict[str, Any]) -> None:
        reason = frame["finish_reason"]
        assert (reason == "error") == ("error" in frame), f"error and finish_reason disagree: {frame}"
        assert generation.next_seq <= frame["usage"]["completion_tokens"], f"more tokens sent than made: {frame}"
        if reason == "cancelled":
            assert generation.cancels_sent or id.startswith("auto-"), f"cancelled by nobody: {frame}"
            assert frame["timings"]["cancel_ms"] >= 0
        del self.open[id]
        self.texts[id] = generation.text
        self.dones.append(frame)
