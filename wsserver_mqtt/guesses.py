"""Wrong keys on a broker, counted so that one who guesses is delayed and those with a right key are not. Pure.

A publisher chooses its topics itself, so a count by topic alone bounds nothing: all wrong keys of a root are counted
together as well. That count holds up only those that have never shown a right key here: otherwise ten guesses a minute
would lock all clients out.
"""

from collections import OrderedDict

from wsserver.auth import MAX_REMEMBERED, Failures

# Times the wrong keys of one publisher that all publishers of a root may show in a minute.
PUBLISHERS = 10
ROOT = NAMELESS = ""


class Guesses:
    """The wrong keys of the last minute: of each user, of all without a user, and of the root."""

    def __init__(self, limit: int) -> None:
        self._each = Failures(limit)
        self._root = Failures(PUBLISHERS * limit)
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    def wait(self, user: str, reply: str, now: float) -> float:
        """Return the seconds for which no key of a publisher is compared, 0 if the next one is."""
        wait = self._each.wait(self._name(user, reply), now)
        return wait if _place(user, reply) in self._known else max(wait, self._root.wait(ROOT, now))

    def right(self, user: str, reply: str) -> None:
        """Remember that a publisher has shown a right key."""
        place = _place(user, reply)
        self._known[place] = None
        self._known.move_to_end(place)
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    def wrong(self, user: str, reply: str, now: float) -> None:
        """Count a wrong key; that of a publisher that is known is not the root's."""
        self._each.add(self._name(user, reply), now)
        if _place(user, reply) not in self._known:
            self._root.add(ROOT, now)

    def _name(self, user: str, reply: str) -> str:
        if user:
            return f"user {user}"
        return f"topic {reply}" if _place(user, reply) in self._known else NAMELESS


def _place(user: str, reply: str) -> tuple[str, str]:
    return ("user", user) if user else ("topic", reply)
