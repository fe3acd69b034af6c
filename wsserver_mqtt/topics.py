"""The topics of one server: which it listens to, where answers may go. Pure; knows no broker and no messages."""

from typing import NamedTuple

from wsserver.config import BadSetting

MAX_LENGTH = 1024  # characters of a topic
MAX_LEVELS = 64  # more of them than brokers take, and they hang up on whoever publishes there


class Topics(NamedTuple):
    """What lies under a server's root; `more_replies` are topics outside of it under which answers may go as well."""

    root: str
    more_replies: tuple[str, ...] = ()

    @property
    def request(self) -> str:
        """Where requests are published, or one level below, at the name of a user."""
        return f"{self.root}/request"

    @property
    def cancel(self) -> str:
        """Where cancels are published, or one level below like requests."""
        return f"{self.root}/cancel"

    @property
    def status(self) -> str:
        """Where the server's state is retained."""
        return f"{self.root}/status"

    @property
    def events(self) -> str:
        """Where what happens to models is told."""
        return f"{self.root}/events"

    def user(self, topic: str) -> str | None:
        """Give the user whom a request's or cancel's topic names, "" if none; None if it is no topic for either."""
        for base in (self.request, self.cancel):
            if topic == base:
                return ""
            user = topic.removeprefix(f"{base}/")
            if user != topic and user and "/" not in user:
                return user
        return None

    def takes_only_cancels(self, topic: str) -> bool:
        """Whether nothing else is taken at a topic."""
        return topic.startswith(self.cancel)

    def allows(self, reply: str, user: str) -> bool:
        """Whether answers to a user, "" for one without a name, may go to a topic."""
        if not is_topic(reply):
            return False
        under = f"{self.root}/reply/{user}/" if user else f"{self.root}/reply/"
        return (reply.startswith(under) and reply != under) or any(
            reply == topic or reply.startswith(f"{topic}/") for topic in self.more_replies
        )


def is_topic(text: str) -> bool:
    """Whether something can be published there: no wildcard, none of the broker's own topics, and what every broker takes.

    One that does not take a topic, for a control character in it perhaps, hangs up on the server that publishes there.
    """
    wild = any(character in text for character in "+#")
    short = len(text) <= MAX_LENGTH and text.count("/") < MAX_LEVELS
    return bool(text) and short and text.isprintable() and not text.startswith("$") and not wild


def topics(root: str, more_replies: tuple[str, ...]) -> Topics:
    """Give the topics of a server.

    Raises:
        BadSetting: one of them can be none.
    """
    if not is_topic(root) or root.endswith("/"):
        raise BadSetting(f"--mqtt-root: {root!a} is no topic; use one like llm/kitchen, without + # and a / at the end")
    if wrong := [topic for topic in more_replies if not is_topic(topic) or topic.endswith("/")]:
        raise BadSetting(
            f"--mqtt-reply-topics: {wrong[0]!a} is no topic; use one like devices, without + # and a / at the end"
        )
    return Topics(root, more_replies)
