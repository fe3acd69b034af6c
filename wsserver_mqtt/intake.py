"""Which messages from the broker are read at all, by who publishes them. Pure; the caller brings the time.

A subscriber is not told who publishes: the only name is the user in the topic, which a broker's access list vouches for.
Without one the topic for answers stands for the publisher. Anybody may choose that, so those without a user share a bound.
"""

from collections import OrderedDict
from typing import NamedTuple

from wsserver.limits import LONG_MESSAGE, TokenBucket, bucket

# Of the messages of a root that are read, the share that publishers without a user may take.
NAMELESS_SHARE = 0.5
# Refusals a second: to one publisher, and to all. What else comes too fast is dropped without an answer.
REFUSALS_EACH, REFUSALS_ALL = 1.0, 20.0
# Publishers that are remembered; the one that was silent longest is forgotten first.
REMEMBERED = 4096


class Publisher(NamedTuple):
    """Who published, as far as that can be known; a cancel has bounds of its own, so that a flood does not hold it up."""

    user: str
    reply: str
    cancels: bool


class Excess(NamedTuple):
    """A message that came too fast: whether it may be answered, how many others were dropped, and when to try again."""

    answered: bool
    dropped: int
    retry_after: float


class _Account:
    def __init__(self, rate: float) -> None:
        self.messages = bucket(rate)
        self.refusals = TokenBucket(REFUSALS_EACH, 1.0)
        self.dropped = 0


class Intake:
    """Bounds the messages of each publisher, of all without a user, and of all together."""

    def __init__(self, each: float, together: float) -> None:
        self._each = each
        # By whether they are cancels.
        self._all = {cancels: bucket(together) for cancels in (False, True)}
        self._nameless = {cancels: bucket(NAMELESS_SHARE * together) for cancels in (False, True)}
        self._refusals = TokenBucket(REFUSALS_ALL, REFUSALS_ALL)
        self._accounts: OrderedDict[Publisher, _Account] = OrderedDict()
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._accounts)

    def take(self, publisher: Publisher, size: int, now: float) -> Excess | None:
        """Let a message of `size` bytes in, and return None; or say what is to be done with one too many."""
        account = self._account(publisher)
        bounds = [account.messages, self._all[publisher.cancels]]
        if not publisher.user:
            bounds.append(self._nameless[publisher.cancels])
        wait = max(bound.wait(now) for bound in bounds)
        if not wait:
            for bound in bounds:
                bound.spend(1 + size // LONG_MESSAGE, now)
            return None
        answered = not (account.refusals.wait(now) or self._refusals.wait(now))
        if answered:
            account.refusals.spend(1, now)
            self._refusals.spend(1, now)
        excess = Excess(answered, account.dropped, wait)
        account.dropped = 0 if answered else account.dropped + 1
        self._dropped += not answered
        return excess

    def dropped(self) -> int:
        """Return how many messages were dropped without an answer since this was asked last."""
        count, self._dropped = self._dropped, 0
        return count

    def _account(self, publisher: Publisher) -> _Account:
        # A user is one publisher, whatever topic the answers go to.
        if publisher.user:
            publisher = publisher._replace(reply="")
        account = self._accounts.get(publisher)
        if account is None:
            account = self._accounts[publisher] = _Account(self._each)
            if len(self._accounts) > REMEMBERED:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(publisher)
        return account
