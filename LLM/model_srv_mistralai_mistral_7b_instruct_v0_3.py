"""Mistral-7B-Instruct-v0.3, in its makers' own format."""

from LLM.mistral_chat import MistralV3


class ModelHandler(MistralV3):
    """Nothing but the format; its card states no sampling."""
