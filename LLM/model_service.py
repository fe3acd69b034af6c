"""Finds drop-ins and model folders, loads models, keeps one engine per loaded model. Knows no clients.

A client's string is only ever looked up in the listing made at start: it never reaches an import, a path or a hub.
"""

import asyncio
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from LLM._base_model_handler import BaseModelHandler, LoadOptions
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.model import Abandoned, Model, ModelSpec, Waiter

MODELS_ROOT = Path(__file__).parent
# Each has a thread and its weights, and one model loaded in two ways is two: what clients may ask for must have an end.
MAX_MODELS = 8


@dataclass(frozen=True, slots=True)
class Listed:
    """A model that can be loaded."""

    handler: type[BaseModelHandler]
    folder: Path


class ModelService:
    """The models of this server."""

    def __init__(self, default: str, options: LoadOptions, settings: EngineSettings, root: Path = MODELS_ROOT) -> None:
        self.listing = list_models(root)
        self._options = options
        self._settings = settings
        self._models: dict[ModelSpec, Model] = {}
        self._default = default
        self.resolve()

    def resolve(
        self,
        model: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        quantization: str | None = None,
    ) -> ModelSpec:
        """Say which model a client means; None takes the server's default.

        Raises:
            Refused: `model_not_found`, naming those there are, or `unsupported`.
        """
        name = self._default if model is None else model
        if name not in self.listing:
            there = ", ".join(sorted(self.listing)) or "none"
            raise Refused("model_not_found", f"this server has no such model; it has: {there}", "model")
        if quantization not in (None, "none"):
            raise Refused("unsupported", 'only "none" is served so far', "quantization")
        default = self._options
        options = replace(
            default,
            dtype=dtype or default.dtype,
            device=device or default.device,
            quantization=quantization or default.quantization,
        )
        return ModelSpec(name, options)

    async def get(self, spec: ModelSpec, waiter: Waiter) -> Model:
        """Give the loaded model, after loading it if need be; those who want the same share one load.

        Raises:
            Refused: why the load failed.
        """
        while True:
            model = self._models.get(spec)
            if model is None or model.failed:
                if len(self._models) >= MAX_MODELS and model is None:
                    message = f"{MAX_MODELS} models are loaded already, which is all this server holds; use one of them"
                    raise Refused("overloaded", message)
                listed = self.listing[spec.model]
                model = Model(spec, listed.handler(), listed.folder, self._settings, self._forget)
                self._models[spec] = model
            try:
                await model.wait(waiter)
            except Abandoned:
                continue  # it ended for those who had left, not for this one
            else:
                return model

    def status(self) -> list[dict[str, object]]:
        """Give the status entries of all models that are loaded or being loaded, or whose engine died."""
        return [model.status() for model in self._models.values()]

    def _forget(self, model: Model) -> None:
        # A load that failed is no model; what clients may name must not fill the server's memory.
        if self._models.get(model.spec) is model:
            del self._models[model.spec]

    async def close(self) -> None:
        """End every load and every engine."""
        await asyncio.gather(*(model.close() for model in self._models.values()))


def list_models(root: Path) -> Mapping[str, Listed]:
    """Find the models under `root`: folders `<vendor>/<model>` with a config.json, and drop-ins that need no folder."""
    drop_ins = {path.stem: _import_drop_in(path.stem) for path in sorted(MODELS_ROOT.glob("model_srv_*.py"))}
    listing = {model_id: Listed(handler, root) for handler in drop_ins.values() for model_id in handler.model_ids}
    for config in sorted(root.glob("*/*/config.json")):
        folder = config.parent
        model_id = f"{folder.parent.name}/{folder.name}"
        listing[model_id] = Listed(drop_ins.get(drop_in_name(model_id), BaseModelHandler), folder)
    return listing


def drop_in_name(model_id: str) -> str:
    """Give the module name of a model's drop-in: `a/B-1.0` is `model_srv_a_b_1_0`."""
    return "model_srv_" + re.sub(r"[^a-z0-9]+", "_", model_id.lower()).strip("_")


def _import_drop_in(name: str) -> type[BaseModelHandler]:
    handler: type[BaseModelHandler] = importlib.import_module(f"LLM.{name}").ModelHandler
    return handler
