"""Imports the drop-ins: those of this package by name, an operator's own from the models' root by path.

One that cannot be imported is told in the log, and is given with what clients of its models are told. Knows no model folder.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from LLM._base_model_handler import BaseModelHandler
from LLM.engine.request import Sampling

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
BROKEN = "its drop-in cannot be imported; its operator finds why in the server's log, and can mend it and restart"
OUTSIDE = "its drop-in is a link that leads out of the models' folder; its operator can put the file itself there"


@dataclass(frozen=True, slots=True)
class DropIn:
    """A drop-in's model handler, and why it cannot be used, if so, in words fit for any client.

    `own` tells an operator's from those that come with the server.
    """

    handler: type[BaseModelHandler]
    problem: str | None = None
    own: bool = False


def find_drop_ins(root: Path) -> dict[str, DropIn]:
    """Import every drop-in; give them by their files' names.

    One in `root` takes the place of the package's of the same name. If it cannot be used, neither is used: its operator
    wanted something else of the model.
    """
    packaged = {
        path.stem: _imported(path, partial(importlib.import_module, f"LLM.{path.stem}"))
        for path in sorted(PACKAGE.glob("model_srv_*.py"))
    }
    if root.resolve() == PACKAGE.resolve():
        return packaged
    own = {path.stem: _own(root, path, packaged.get(path.stem)) for path in sorted(root.glob("model_srv_*.py"))}
    return packaged | own


def _own(root: Path, path: Path, replaced: DropIn | None) -> DropIn:
    # For which models one stands that cannot be used is known where it replaces another.
    otherwise = replaced.handler if replaced else BaseModelHandler
    if replaced:
        log.info("%s takes the place of the drop-in of that name that comes with the server", path)
    if not Path(os.path.realpath(path)).is_relative_to(root.resolve()):  # Path.resolve() raises for links in a circle
        log.error("%s is not imported: it is a link that leads out of the models' folder", path)
        return DropIn(otherwise, OUTSIDE, own=True)
    return replace(_imported(path, partial(_run, path), otherwise), own=True)


def _imported(path: Path, module: Callable[[], ModuleType], otherwise: type[BaseModelHandler] = BaseModelHandler) -> DropIn:
    try:
        return DropIn(_checked(getattr(module(), "ModelHandler", None)))
    except (Exception, SystemExit):  # whatever a file of somebody else's does when it is run
        log.exception("%s cannot be imported; its models are refused", path)
        return DropIn(otherwise, BROKEN)


def _run(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = module_from_spec(spec)
    # Where Python looks for the module of a class, to resolve a dataclass's annotations for one.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _checked(handler: object) -> type[BaseModelHandler]:
    """Give a drop-in's class, if its facts are such as can be used; what is wrong with them would show much later."""
    if not (isinstance(handler, type) and issubclass(handler, BaseModelHandler)):
        raise TypeError("a drop-in has a class ModelHandler(BaseModelHandler)")
    for fact in ("model_ids", "also_listed_as", "end_tokens"):
        if isinstance(getattr(handler, fact), str):
            raise TypeError(f'{fact} is a tuple of strings, also if there is one: ("{getattr(handler, fact)}",)')
    if unknown := handler.sampling.keys() - {parameter.name for parameter in fields(Sampling)}:
        raise TypeError(f"sampling has no parameter {', '.join(sorted(unknown))}")
    return handler
