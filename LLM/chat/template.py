"""A model's chat template, rendered within bounds: writes a conversation as the model's prompt. Knows no token ids."""

import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from LLM._base_model_handler import ChatMessage
from LLM.chat.reading import reading
from LLM.chat.template_process import POOL, Died, Overrun
from LLM.errors import Refused

log = logging.getLogger(__name__)

SECONDS = 2.0
PROBE = [ChatMessage(role="user", content="Hello")]
# Marks the end of a message that is to be continued; the space tells whether the template takes it off.
END = f"{secrets.token_hex(8)}end "
ADVICE = "send prompt instead, or have the server's operator replace the template"
FAILURES = {
    "memory": "needs more memory than it may have",
    "output": "writes more than it may",
    "recursion": "calls itself too often",
}
CHANGES = "the model's chat template changes the last message, which is to be continued; end with a user's"


class ChatTemplate:
    """One template, with the names of the tokenizer's special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], seconds: float = SECONDS) -> None:
        self.problem: str | None = None  # why it cannot be used, in words
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._seconds = seconds

    def probe(self) -> str | None:
        """Try it once, and return what is wrong with it; what it only refuses to write is no fault."""
        try:
            self(PROBE)
        except Refused as refused:
            if refused.reason == "unsupported":
                self.problem = refused.message
        return self.problem

    def __call__(self, messages: Sequence[ChatMessage]) -> str:
        """Write a conversation; a last message of the assistant's is to be continued.

        Raises:
            Refused: `bad_message` where the template refuses it, `unsupported` where the template fails.
        """
        if self.problem:
            raise Refused("unsupported", self.problem, "messages")
        if messages[-1]["role"] != "assistant":
            return self._render([dict(message) for message in messages], goes_on=False)
        last = messages[-1]
        if "content" not in self._source:
            raise Refused("bad_message", CHANGES, "messages")
        marked = [dict(message) for message in (*messages[:-1], {**last, "content": last["content"] + END})]
        text = self._render(marked, goes_on=True)
        end = text.rfind(END.strip())
        if end < 0 or last["content"].strip() not in text:
            raise Refused("bad_message", CHANGES, "messages")
        return text[:end] if text.startswith(END, end) else text[:end].rstrip()

    def _render(self, messages: list[dict[str, Any]], goes_on: bool) -> str:
        values = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": not goes_on,
        }
        try:
            answer = POOL.render(self._source, values, self._seconds, reading().check)
        except Overrun:
            raise self._failed(f"took longer than {self._seconds:g} s") from None
        except Died:
            raise self._failed("ended the process that renders it") from None
        match answer:
            case {"text": str(text)}:
                return text
            case {"refused": why}:
                raise Refused("bad_message", f"the model's chat template refuses this conversation: {why}", "messages")
            case {"raised": "ValueError"} if goes_on:
                raise Refused("bad_message", CHANGES, "messages")
            case {"failed": why}:
                raise self._failed(FAILURES[why])
        raise self._failed(f"fails ({answer.get('raised')})")

    def _failed(self, why: str) -> Refused:
        log.warning("a chat template %s", why)
        return Refused("unsupported", f"the model's chat template {why}; {ADVICE}", "messages")
