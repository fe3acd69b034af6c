"""Finds the models there are: folders under the models' root, and the drop-ins that say how to use them. Loads none.

A client's string is only ever looked up in the listing: it never reaches an import, a path or a hub.
"""

import importlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from LLM._base_model_handler import BaseModelHandler

MODELS_ROOT = Path(__file__).parent
OUTSIDE = "its folder is a link that leads out of the models' folder; its operator can move the model itself there"
TWICE = "several drop-ins claim this model; its operator can take away all but one of them"


@dataclass(frozen=True, slots=True)
class Listed:
    """A model by its one id, and in which way its operator has to help first, if so, in words fit for any client."""

    id: str
    handler: type[BaseModelHandler]
    folder: Path
    problem: str | None = None


def list_models(root: Path, drop_ins: Mapping[str, type[BaseModelHandler]] | None = None) -> dict[str, Listed]:
    """Find the models under `root`: folders `<vendor>/<model>` with a config.json, and drop-ins that need no folder.

    A folder that has one of the names its drop-in states is found by the others too, unless they have folders of their own;
    it keeps its one id.
    """
    drop_ins = find_drop_ins() if drop_ins is None else drop_ins
    claims = Counter(name for handler in drop_ins.values() for name in (*handler.model_ids, *handler.also_listed_as))
    named = {name: handler for handler in drop_ins.values() for name in handler.also_listed_as}
    listing = {name: Listed(name, handler, root) for handler in drop_ins.values() for name in handler.model_ids}
    others: dict[str, Listed] = {}
    for config in sorted(root.glob("*/*/config.json")):
        folder = config.parent
        name = f"{folder.parent.name}/{folder.name}"
        handler = drop_ins.get(drop_in_name(name)) or named.get(name, BaseModelHandler)
        outside = not folder.resolve().is_relative_to(root.resolve())
        listing[name] = Listed(name, handler, folder, OUTSIDE if outside else None)
        others |= dict.fromkeys(handler.also_listed_as, listing[name])
    twice = {name: Listed(name, BaseModelHandler, root, TWICE) for name, count in claims.items() if count > 1}
    return others | listing | twice


def find_drop_ins() -> dict[str, type[BaseModelHandler]]:
    """Import every drop-in; give their model handlers by their files' names."""
    return {path.stem: _import_drop_in(path.stem) for path in sorted(MODELS_ROOT.glob("model_srv_*.py"))}


def drop_in_name(model_id: str) -> str:
    """Give the module name of a model's drop-in: `a/B-1.0` is `model_srv_a_b_1_0`."""
    return "model_srv_" + re.sub(r"[^a-z0-9]+", "_", model_id.lower()).strip("_")


def _import_drop_in(name: str) -> type[BaseModelHandler]:
    handler: type[BaseModelHandler] = importlib.import_module(f"LLM.{name}").ModelHandler
    return handler
