"""The design's rules, read off the syntax trees of every file. Each rule is also shown a small file that breaks it."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("wsserver", "wsserver_mqtt", "handlers", "LLM")

Modules = dict[str, ast.Module]
Rule = Callable[[Modules], list[str]]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def read(*folders: str) -> Modules:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {name_of(path): ast.parse(path.read_text()) for path in paths}


PRODUCT = read(*PACKAGES)
TESTS = read("tests")


def imports(tree: ast.AST) -> Iterator[str]:
    """Give every imported name in full: `from a.b import c` is a.b and a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def importers(modules: Modules, *tops: str) -> Iterator[str]:
    """Give the modules that import one of `tops`, or something in it."""
    for module, tree in modules.items():
        if any(name == top or name.startswith(top + ".") for name in imports(tree) for top in tops):
            yield module


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Give every call with the last word of what it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


def edges(modules: Modules, module: str) -> set[str]:
    """Give the repository's modules that one imports itself."""
    return {name for name in imports(modules[module]) if name in modules and name != module}


def reached(modules: Modules, start: str) -> set[str]:
    """Give every module of the repository that is loaded when `start` is, packages on the way among them."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name in modules and name not in seen:
            seen.add(name)
            todo += [*edges(modules, name), name.rpartition(".")[0]]
    return seen


# The rules: each gives what breaks it, nothing if all is well.


def packages_know_only_what_they_may(modules: Modules) -> list[str]:
    strangers: dict[str, tuple[str, ...]] = {
        "wsserver": ("LLM", "handlers", "wsserver_mqtt"),
        "wsserver_mqtt": ("LLM", "handlers"),
        "LLM": ("wsserver", "wsserver_mqtt", "handlers"),
        "handlers": ("wsserver_mqtt",),
    }
    return [
        name
        for package, unknown in strangers.items()
        for name in importers(modules, *unknown)
        if name.partition(".")[0] == package and name != "wsserver.__main__"
    ]


def imports_are_absolute(modules: Modules) -> list[str]:
    return [module for module, tree in modules.items() if any(name.startswith(".") for name in imports(tree))]


def torch_is_imported_under_llm_only(modules: Modules) -> list[str]:
    users = importers(modules, "torch", "transformers", "safetensors", "accelerate", "triton", "gguf")
    return [name for name in users if name.partition(".")[0] != "LLM"]


def light_modules_reach_no_torch(modules: Modules) -> list[str]:
    heavy = set(importers(modules, "torch", "transformers", "safetensors", "numpy"))
    pure = ("request", "scheduler", "answer", "detokenizer", "stream", "thread")
    light = ["LLM._base_model_handler", "LLM.model_srv_wsserver_echo", "wsserver.__main__"]
    light += [f"LLM.engine.{name}" for name in pure]
    return [f"{name} reaches {found}" for name in light for found in heavy & reached(modules, name)]


def the_client_is_light(modules: Modules) -> list[str]:
    own = {"wsserver", "websockets", "orjson", "msgspec", *sys.stdlib_module_names}
    return [
        f"{module} imports {name}"
        for start in ("wsserver.client", "wsserver.ask")
        for module in reached(modules, start)
        for name in imports(modules[module])
        if name.partition(".")[0] not in own
    ]


def the_terminals_library_is_imported_by_the_chat_alone(modules: Modules) -> list[str]:
    others = {name: tree for name, tree in modules.items() if name != "wsserver.chat"}
    return list(importers(others, "prompt_toolkit", "wsserver.chat"))


def nothing_that_serves_can_download(modules: Modules) -> list[str]:
    downloaders = {"LLM.fetch", "LLM.default_model", "LLM.download.bounds"}
    renders = "LLM.chat.template_process"  # the one program it starts imports jinja2 alone, and has no environment
    clients = ("huggingface_hub", "httpx", "httpx2", "requests", "aiohttp", "urllib.request", "http.client", "subprocess")
    return [name for name in importers(modules, *downloaders, *clients) if name not in (*downloaders, renders)]


def threads_are_made_in_two_files(modules: Modules) -> list[str]:
    makers = "threading", "_thread", "concurrent", "multiprocessing"
    lock = "from threading import Lock"  # for what a library's threads call
    others = {
        name: ast.Module([node for node in tree.body if ast.unparse(node) != lock], []) for name, tree in modules.items()
    }
    return [name for name in importers(others, *makers) if name not in ("LLM.engine.thread", "LLM.blocking")]


def imports_stand_at_the_top(modules: Modules) -> list[str]:
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    return [
        f"{module}:{node.lineno}"
        for module, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, inner) and any(imports(node))
    ]


def only_two_files_import_by_name(modules: Modules) -> list[str]:
    dynamic = {"import_module", "__import__", "spec_from_file_location", "run_module", "run_path"}
    allowed = {
        "LLM.drop_ins": {"import_module", "spec_from_file_location"},  # an operator's drop-ins lie outside the package
        "LLM._base_model_handler": {"import_module"},
    }
    return [
        f"{module}:{call.lineno}"
        for module, tree in modules.items()
        for name, call in calls(tree)
        if (name in dynamic and name not in allowed.get(module, ()))
        or (name in ("exec", "eval") and isinstance(call.func, ast.Name))
    ]


def no_module_reaches_itself(modules: Modules) -> list[str]:
    # Packages on the way do not count here: a module may be imported while its package's __init__ still runs.
    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        todo = edges(modules, start)
        while todo:
            name = todo.pop()
            seen.add(name)
            todo |= edges(modules, name) - seen
        return seen

    return [module for module in modules if module in reaches(module)]


def nothing_is_global(modules: Modules) -> list[str]:
    return [f"{m}:{node.lineno}" for m, tree in modules.items() for node in ast.walk(tree) if isinstance(node, ast.Global)]


def no_exception_is_swallowed(modules: Modules) -> list[str]:
    found = []
    for module, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or (catches_all(node.type) and idle(node.body))):
                found.append(f"{module}:{node.lineno}")
        found += [
            f"{module}: suppress" for name, call in calls(tree) if name == "suppress" and any(map(catches_all, call.args))
        ]
    return found


def catches_all(node: ast.expr) -> bool:
    return any(isinstance(n, ast.Name) and n.id in ("Exception", "BaseException") for n in ast.walk(node))


def idle(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(s, ast.Pass | ast.Continue) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in body
    )


def classes_are_named_for_what_they_are(modules: Modules) -> list[str]:
    vague = re.compile("Manager|Helper|Util|Wrapper|Mixin|Context")
    return [
        f"{module}: {node.name}"
        for module, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and vague.search(node.name)
    ]


def no_file_is_a_drawer_of_odds_and_ends(modules: Modules) -> list[str]:
    return [name for name in modules if name.rpartition(".")[2] in ("util", "utils", "common", "helper", "helpers", "misc")]


def nothing_sleeps(modules: Modules) -> list[str]:
    """sleep(0) lets others run; any other sleep stands for an event nobody waits for."""
    return [
        f"{module}:{call.lineno}"
        for module, tree in modules.items()
        for name, call in calls(tree)
        if name == "sleep" and [getattr(a, "value", None) for a in call.args] != [0]
    ]


def one_file_knows_the_mqtt_library(modules: Modules) -> list[str]:
    return [name for name in importers(modules, "aiomqtt", "paho") if name != "wsserver_mqtt.broker"]


def one_file_awaits_the_socket(modules: Modules) -> list[str]:
    return [
        f"{module}:{node.lineno}"
        for module, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Await) and module != "wsserver.connection"
        for name, _ in calls(node)
        if name in ("recv", "send", "ping", "pong")
    ]


BREACHES: list[tuple[Rule, dict[str, str]]] = [
    (packages_know_only_what_they_may, {"wsserver.server": "import LLM.model_service"}),
    (packages_know_only_what_they_may, {"wsserver.session": "from handlers import dispatcher"}),
    (packages_know_only_what_they_may, {"LLM.engine.thread": "from wsserver.protocol import Token"}),
    (packages_know_only_what_they_may, {"LLM.model": "import handlers"}),
    (packages_know_only_what_they_may, {"wsserver_mqtt.face": "from handlers import dispatcher"}),
    (packages_know_only_what_they_may, {"wsserver.peer": "from wsserver_mqtt.reply import Reply"}),
    (imports_are_absolute, {"wsserver.server": "from . import protocol"}),
    (torch_is_imported_under_llm_only, {"handlers.status": "import torch.cuda"}),
    (torch_is_imported_under_llm_only, {"wsserver.server": "from transformers import AutoTokenizer"}),
    (light_modules_reach_no_torch, {"LLM.engine.answer": "from torch import Tensor"}),
    (light_modules_reach_no_torch, {"LLM._base_model_handler": "from LLM import loader", "LLM.loader": "import torch"}),
    (light_modules_reach_no_torch, {"LLM.model_srv_wsserver_echo": "", "LLM": "import torch"}),
    (the_client_is_light, {"wsserver.client": "from wsserver.server import Server", "wsserver.server": "import uvloop"}),
    (the_client_is_light, {"wsserver.client": "from LLM.errors import Refused"}),
    (the_client_is_light, {"wsserver.ask": "from wsserver import shell", "wsserver.shell": "import rich"}),
    (the_terminals_library_is_imported_by_the_chat_alone, {"wsserver.shell": "from prompt_toolkit import PromptSession"}),
    (the_terminals_library_is_imported_by_the_chat_alone, {"wsserver.__main__": "from wsserver import chat"}),
    (nothing_that_serves_can_download, {"wsserver.__main__": "from LLM.fetch import fetch"}),
    (nothing_that_serves_can_download, {"LLM.listing": "from LLM import default_model"}),
    (nothing_that_serves_can_download, {"LLM.listing": "from LLM.download.bounds import listing"}),
    (nothing_that_serves_can_download, {"LLM.loader": "from huggingface_hub import snapshot_download"}),
    (nothing_that_serves_can_download, {"handlers.init": "import urllib.request"}),
    (threads_are_made_in_two_files, {"LLM.model": "from concurrent.futures import ThreadPoolExecutor"}),
    (threads_are_made_in_two_files, {"wsserver.server": "import threading"}),
    (imports_stand_at_the_top, {"LLM.model": "def f():\n    import json"}),
    (imports_stand_at_the_top, {"LLM.model": "class A:\n    async def f(self):\n        from json import loads"}),
    (only_two_files_import_by_name, {"handlers.init": "import importlib\nimportlib.import_module('x')"}),
    (only_two_files_import_by_name, {"LLM.model_service": "eval('1')"}),
    (only_two_files_import_by_name, {"LLM.drop_ins": "import runpy\nrunpy.run_path('x')"}),
    (only_two_files_import_by_name, {"LLM._base_model_handler": "spec_from_file_location('x', 'y')"}),
    (no_module_reaches_itself, {"LLM.a": "import LLM.b", "LLM.b": "from LLM import c", "LLM.c": "from LLM.a import x"}),
    (nothing_is_global, {"wsserver.server": "def f():\n    global state"}),
    (no_exception_is_swallowed, {"wsserver.server": "try:\n    f()\nexcept:\n    raise"}),
    (no_exception_is_swallowed, {"wsserver.server": "try:\n    f()\nexcept (OSError, Exception):\n    pass"}),
    (no_exception_is_swallowed, {"wsserver.server": "with contextlib.suppress(BaseException):\n    f()"}),
    (classes_are_named_for_what_they_are, {"wsserver.server": "class ConnectionManager: pass"}),
    (no_file_is_a_drawer_of_odds_and_ends, {"LLM.engine.utils": ""}),
    (nothing_sleeps, {"wsserver.server": "async def f():\n    await asyncio.sleep(0.1)"}),
    (nothing_sleeps, {"LLM.model": "from time import sleep\nsleep(DELAY)"}),
    (one_file_knows_the_mqtt_library, {"wsserver_mqtt.reply": "from aiomqtt import Client"}),
    (one_file_awaits_the_socket, {"handlers.cancel": "async def f(socket):\n    await socket.send('x')"}),
]
RULES = list(dict.fromkeys(rule for rule, _ in BREACHES))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_product_keeps_the_rule(rule: Rule):
    assert rule(PRODUCT) == []


@pytest.mark.parametrize(("rule", "files"), BREACHES, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BREACHES)])
def test_a_breach_of_the_rule_is_seen(rule: Rule, files: dict[str, str]):
    assert rule({name: ast.parse(text) for name, text in files.items()})


def test_the_tests_sleep_no_more_than_the_product():
    assert nothing_sleeps(TESTS) == []


def test_the_rules_look_at_every_file_of_the_product():
    for package in PACKAGES:
        assert {name for name in PRODUCT if name.partition(".")[0] == package} >= {package}
    assert {"wsserver.__main__", "LLM.engine.thread", "LLM.model_srv_wsserver_echo", "handlers.generate"} <= PRODUCT.keys()


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: name.replace(".", "/") for name in PRODUCT if (ROOT / name.replace(".", "/")).is_dir()}
    assert set(settings["packages"]) == folders.keys()
    # The container installs before it has the code, and wants to see each of them.
    container = (ROOT / "Dockerfile").read_text()
    assert all(f"COPY {folder}/__init__.py {folder}/\n" in container for folder in folders.values())


def test_the_composition_root_knows_everybody():
    assert {"LLM.model_service", "handlers", "wsserver.server"} <= edges(PRODUCT, "wsserver.__main__")


@pytest.mark.parametrize("module", [name for name in TESTS if "test_" not in name and ".gpu" not in name])
def test_what_no_test_imports_can_be_imported_all_the_same(module: str):
    importlib.import_module(module)  # much of it is run by hand, and long after what it imports was renamed


FACTORIES = {
    "tensor",
    "as_tensor",
    "zeros",
    "empty",
    "ones",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
}


def undecided_dtypes(modules: Modules) -> list[str]:
    """Give the engine's calls that make a tensor of torch's default dtype, which is the process's and may change."""
    return [
        f"{module}: torch.{name}"
        for module, tree in modules.items()
        if module.startswith("LLM.engine")
        for name, call in calls(tree)
        if name in FACTORIES and isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
        if "dtype" not in {keyword.arg for keyword in call.keywords}
    ]


def test_the_engine_names_the_dtype_of_every_tensor_it_makes():
    assert undecided_dtypes(PRODUCT) == []
    bad = {"LLM.engine.bad": ast.parse("torch.zeros(3)\ntorch.zeros(3, dtype=torch.long)\nother.zeros(3)")}
    assert undecided_dtypes(bad) == ["LLM.engine.bad: torch.zeros"]
