"""Llama-3.2-3B-Instruct, in Meta's own format.

The folder's chat template writes a system turn with a date of its own and trims every message; Meta's format does neither.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from LLM._base_model_handler import BaseModelHandler, ChatMessage
from LLM.plain_text import Control, Piece

# Of what is all white space or has none, Meta's tokenizer encodes so many characters at a time.
LONGEST_RUN = 25_000


class ModelHandler(BaseModelHandler):
    """One header and one text a turn, in any order; every turn but one to be continued is ended."""

    also_listed_as = ("llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct")
    sampling = {"temperature": 0.6, "top_p": 0.9}
    end_tokens = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

    def pieces(self, messages: Sequence[ChatMessage]) -> Iterable[Piece]:
        """Write the turns, and the header of the answer where none is begun."""
        goes_on = messages[-1]["role"] == "assistant"
        yield Control("<|begin_of_text|>")
        for turn, message in enumerate(messages, 1):
            yield from self._header(message["role"])
            yield from _cut(message["content"])
            if turn < len(messages) or not goes_on:
                yield Control("<|eot_id|>")
        if not goes_on:
            yield from self._header("assistant")

    def _header(self, role: str) -> Iterable[Piece]:
        return (Control("<|start_header_id|>"), role, Control("<|end_header_id|>"), "\n\n")


def _cut(text: str) -> Iterable[str]:
    runs = re.finditer(r"\s+|\S+", text) if len(text) > LONGEST_RUN else ()
    cuts = [run.start() + n for run in runs for n in range(LONGEST_RUN, len(run[0]), LONGEST_RUN)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
