"""Qwen3-0.6B, by its folder's chat template.

It thinks first: an answer begins with `<think>`, and the template takes the thoughts out of earlier answers. What it goes on
from where a conversation ends with an assistant message is an answer whose thoughts are over. `/no_think` in a user's or
system's message asks for an answer with none.
"""

from LLM._base_model_handler import BaseModelHandler


class ModelHandler(BaseModelHandler):
    """The card's sampling for thinking; greedy decoding, it says, repeats itself without end."""

    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    end_tokens = ("<|im_end|>", "<|endoftext|>")
