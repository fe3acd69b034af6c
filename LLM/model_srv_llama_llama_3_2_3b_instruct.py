"""Llama-3.2-3B-Instruct, in Meta's own format.

The folder's chat template writes a system turn with a date of its own and trims every message; Meta's format does neither.
"""

from collections.abc import Iterable, Sequence

from LLM._base_model_handler import BaseModelHandler, ChatMessage
from LLM.plain_text import Control, Piece


class ModelHandler(BaseModelHandler):
    """One header and one text a turn, in any order; every turn but one to be continued is ended."""

    also_listed_as = ("llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct")
    sampling = {"temperature": 0.6, "top_p": 0.9}
    end_tokens = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

    def pieces(self, messages: Sequence[ChatMessage]) -> Iterable[Piece]:
        """Write the turns, and the header of the answer where none is begun."""
        yield Control("<|begin_of_text|>")
        for message in messages:
            yield from self._header(message["role"])
            yield message["content"]
            if message is not messages[-1] or message["role"] != "assistant":
                yield Control("<|eot_id|>")
        if messages[-1]["role"] != "assistant":
            yield from self._header("assistant")

    def _header(self, role: str) -> Iterable[Piece]:
        return (Control("<|start_header_id|>"), role, Control("<|end_header_id|>"), "\n\n")
