"""SmolLM2-135M-Instruct, the default model: small enough for any machine."""

from LLM._base_model_handler import BaseModelHandler


class ModelHandler(BaseModelHandler):
    """The model card's own sampling; everything else is the folder's."""

    sampling = {"temperature": 0.2, "top_p": 0.9}
