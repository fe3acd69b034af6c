"""What the event loop's side and the thread's side of an engine hand to each other. Knows neither of them."""

import queue
from collections.abc import Hashable
from dataclasses import dataclass

from LLM.engine.request import Part
from LLM.engine.stream import GenerationStream


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a stream's request."""

    stream: GenerationStream


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request; a key that is not open is ignored."""

    key: Hashable


@dataclass(frozen=True, slots=True)
class Close:
    """End every request, and the thread."""


Inbox = queue.SimpleQueue[Open | Cancel | Close]
# Parts go by stream, not by key: a key may be opened again while parts of its last stream are still on their way.
Parts = list[tuple[GenerationStream, Part]]
