"""Gemma 3 270M, instruction-tuned, by its folder's chat template.

It was taught no system role: the template writes a first system message at the beginning of the first user turn. Any other
is refused here, for the template would write a role that the model has not learned. Turns that do not alternate the template
refuses itself.
"""

from LLM._base_model_handler import BaseModelHandler


class ModelHandler(BaseModelHandler):
    """The makers' sampling, and the end of a turn beside that of a text."""

    system_first = True
    sampling = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}
    end_tokens = ("<end_of_turn>", "<eos>")
