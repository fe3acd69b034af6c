"""Mistral-Nemo-Instruct-2407, in its makers' own format: v3, over a tokenizer that writes no space before a text."""

from LLM.mistral_chat import MistralV3


class ModelHandler(MistralV3):
    """The format, and its card's temperature."""

    sampling = {"temperature": 0.3}
