"""Mistral's instruct format v3, as its makers' own package writes it. Knows no token ids.

System messages, wherever they stand, are written before the last user turn; turns of one role in a row are one.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from LLM._base_model_handler import BaseModelHandler, ChatMessage
from LLM.errors import Refused
from LLM.plain_text import Control, Piece


class MistralV3(BaseModelHandler):
    """What the models share whose format is v3."""

    end_tokens = ("</s>",)

    def pieces(self, messages: Sequence[ChatMessage]) -> Iterator[Piece]:
        """Write the turns.

        Raises:
            Refused: `bad_message` for what the format cannot express.
        """
        _check(messages)
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
        turns = [(role, "\n\n".join(m["content"] for m in group)) for role, group in groupby(messages, lambda m: m["role"])]
        turns = [(role, text) for role, text in turns if role != "system"]
        if not turns or turns[0][0] == "assistant":
            turns.insert(0, ("user", ""))
        last_user = max(i for i, (role, _) in enumerate(turns) if role == "user")
        yield Control("<s>")
        for i, (role, text) in enumerate(turns):
            if role == "user":
                yield Control("[INST]")
                yield f"{system}\n\n{text}" if system and i == last_user else text
                yield Control("[/INST]")
            else:
                yield text.rstrip(" ")
                if i < len(turns) - 1 or messages[-1]["role"] != "assistant":
                    yield Control("</s>")


def _check(messages: Sequence[ChatMessage]) -> None:
    roles = [message["role"] for message in messages]
    if roles == ["assistant"]:
        raise Refused("bad_message", "begins with the assistant's words; put a user message before them", "messages")
    if ("assistant", "system") in pairwise(roles):
        message = "has a system message after an assistant's, which this model's format has no place for; move it up"
        raise Refused("bad_message", message, "messages")
    if any(message["role"] == "assistant" and not message["content"] for message in messages):
        raise Refused("bad_message", "has an empty assistant message; leave it out", "messages")
