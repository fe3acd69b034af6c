"""Finds the models there are: folders under the models' root, and the drop-ins that say how to use them. Loads none.

A client's string is only ever looked up in the listing: it never reaches an import, a path or a hub.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from LLM._base_model_handler import BaseModelHandler
from LLM.drop_ins import PACKAGE, DropIn, find_drop_ins
from LLM.model_folder import PICKLED

log = logging.getLogger(__name__)

MODELS_ROOT = PACKAGE
# What makes a folder a model's; one that lacks the others is refused with what it lacks.
SIGNS = ("config.json", "*.safetensors", "*.gguf", *PICKLED)
OUTSIDE = "its folder is a link that leads out of the models' folder; its operator can move the model itself there"
TWICE = (
    "several drop-ins claim this model; its operator can take away all but one of them, "
    "or replace one that comes with the server by giving the other its file name"
)


@dataclass(frozen=True, slots=True)
class Listed:
    """A model by its one id, and in which way its operator has to help first, if so, in words fit for any client."""

    id: str
    handler: type[BaseModelHandler]
    folder: Path
    problem: str | None = None


def list_models(root: Path, drop_ins: Mapping[str, DropIn] | None = None) -> dict[str, Listed]:
    """Find the models under `root`: folders `<vendor>/<model>`, and drop-ins that need no folder.

    A folder's drop-in is the one named after it, or else the one that states its name. A folder that has one of the names
    its drop-in states is found by the others too, unless they have folders of their own; it keeps its one id.
    """
    drop_ins = find_drop_ins(root) if drop_ins is None else drop_ins
    handlers = [drop_in.handler for drop_in in drop_ins.values()]
    claims = Counter(name for handler in handlers for name in (*handler.model_ids, *handler.also_listed_as))
    stated = {name: drop_in for drop_in in drop_ins.values() for name in drop_in.handler.also_listed_as}
    listing = {
        name: Listed(name, drop_in.handler, root, drop_in.problem)
        for drop_in in drop_ins.values()
        for name in drop_in.handler.model_ids
    }
    others: dict[str, Listed] = {}
    for folder in _folders(root):
        name = f"{folder.parent.name}/{folder.name}"
        drop_in = drop_ins.get(drop_in_name(name)) or stated.get(name) or DropIn(BaseModelHandler)
        outside = not folder.resolve().is_relative_to(root.resolve())
        listing[name] = Listed(name, drop_in.handler, folder, OUTSIDE if outside else drop_in.problem)
        others |= dict.fromkeys(drop_in.handler.also_listed_as, listing[name])
    twice = {name: Listed(name, BaseModelHandler, root, TWICE) for name, count in claims.items() if count > 1}
    _tell_of_idle_ones(drop_ins, listing)
    return others | listing | twice


def drop_in_name(model_id: str) -> str:
    """Give the module name of a model's drop-in: `a/B-1.0` is `model_srv_a_b_1_0`."""
    return "model_srv_" + re.sub(r"[^a-z0-9]+", "_", model_id.lower()).strip("_")


def _folders(root: Path) -> Iterator[Path]:
    for folder in sorted(root.glob("*/*")):
        # A name with a dot in front is of what is not finished yet, or of some tool.
        hidden = folder.name.startswith(".") or folder.parent.name.startswith(".")
        if not hidden and any(next(folder.glob(sign), None) for sign in SIGNS):
            yield folder


def _tell_of_idle_ones(drop_ins: Mapping[str, DropIn], listing: Mapping[str, Listed]) -> None:
    used = {listed.handler for listed in listing.values()}
    for name, drop_in in drop_ins.items():
        if drop_in.own and drop_in.problem is None and drop_in.handler not in used:
            log.warning(
                "%s.py is for no model there is; a drop-in is named like its folder: a/B-1.0 has model_srv_a_b_1_0.py", name
            )
