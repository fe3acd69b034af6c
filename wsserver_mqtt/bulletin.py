"""What is told to everybody on the broker: the server's state, retained, and what happens to its models.

Pure; whoever calls brings the time. A state is told when it changes, and every few seconds because its counts go on: that
`steps` stand still while `active` is more than 0 is how a model shows that hangs.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from wsserver_mqtt.messages import Outgoing
from wsserver_mqtt.topics import Topics

# Seconds between two looks for a change, and between two tellings where there is none.
LOOK, REFRESH = 1.0, 5.0
# Events that wait for a broker; the oldest are forgotten first.
MAX_EVENTS = 100

# What everybody is told of the server, as in the `status` of protocol.md.
Overview = Callable[[], dict[str, Any]]


class Bulletin:
    """Says when the state is to be published again, and in which words."""

    def __init__(self, topics: Topics, overview: Overview) -> None:
        self._topics = topics
        self._overview = overview
        self._events: list[Outgoing] = []
        self._told: object = None
        self._told_at = 0.0

    @property
    def offline(self) -> Outgoing:
        """What is retained once the server is gone, whoever says it."""
        return Outgoing(self._topics.status, b'{"type":"status","state":"offline"}', qos=1, retain=True)

    def start_anew(self) -> None:
        """Forget what was told: the broker may have told something else since."""
        self._told = None

    def event(self, event: str, model: str) -> None:
        """Tell what happened to a model."""
        payload = orjson.dumps({"type": "event", "event": event, "model": model})
        self._events = [*self._events, Outgoing(self._topics.events, payload, qos=1)][-MAX_EVENTS:]

    def due(self, now: float) -> list[Outgoing]:
        """Give what is to be published now."""
        messages, self._events = self._events, []
        state = self._state()
        changing = _without_counts(state)
        if changing != self._told or now - self._told_at >= REFRESH:
            self._told, self._told_at = changing, now
            payload = orjson.dumps(state, default=msgspec.to_builtins)
            messages.append(Outgoing(self._topics.status, payload, qos=1, retain=True))
        return messages

    def _state(self) -> dict[str, Any]:
        overview = self._overview()
        load = {name: sum(model[name] for model in overview["models"]) for name in ("active", "queued")}
        return {"type": "status", "state": "online", **overview, "load": load}


def _without_counts(state: dict[str, Any]) -> object:
    """Give what makes a state another one: which models there are and how they are, and who runs and waits."""
    models = [{name: model.get(name) for name in ("id", "state", "stage", "active", "queued")} for model in state["models"]]
    return models, state["server"].draining, state["available"]
