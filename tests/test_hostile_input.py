"""What a client writes is looked up, counted and told, and never opened, imported, run, or read as a pattern or template."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Client

MARK = "h0stile"
MODELS = [
    f"../../etc/{MARK}",
    f"wsserver/../../{MARK}",
    f"/{MARK}/passwd",
    f"wsserver/echo/../{MARK}",
    f"wsserver\\echo\\{MARK}",
    f"wsserver/echo\0{MARK}",
    f"https://{MARK}.example/model",
    f"os;import {MARK}",
    f"LLM.model_srv_{MARK}",
    f"__import__('{MARK}')",
    f"{{{{ {MARK}.__class__ }}}}",
    f"wsserver/e.*{MARK}",
    f"${{jndi:{MARK}}}",
    f"%s%n{MARK}",
]

_seen: list[tuple[str, str]] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "import", "exec", "compile", "os.listdir", "os.scandir", "glob.glob", "os.system"):
        _seen.append((event, repr(arguments)))


sys.addaudithook(_watch)  # for good: Python lets nobody take one away


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """See that nothing is opened, imported or run whose name holds the mark."""
    _seen.clear()
    _watching.append(True)
    try:
        yield
    finally:
        _watching.pop()
    assert not [seen for seen in _seen if MARK in seen[1]]


def test_the_watch_sees_what_it_is_to_see() -> None:
    for act in (lambda: open(f"/tmp/{MARK}"), lambda: __import__(MARK), lambda: compile("1", MARK, "eval")):  # noqa: SIM115
        with pytest.raises(AssertionError), watched(), contextlib.suppress(OSError, ImportError):
            act()


@pytest.mark.parametrize("model", MODELS)
async def test_a_models_name_is_only_looked_up(client: Client, model: str) -> None:
    with watched():
        await client.send(type="init", id="i", model=model)
        error = await client.until("error")
    assert error["code"] == "model_not_found"
    assert MARK not in error["message"]


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for x in range(9) %}x{% endfor %}", "{# #}", "$(id)", "%s", "{0}"])
async def test_what_a_message_says_is_not_run(client: Client, text: str) -> None:
    with watched():
        done = await client.generate(messages=[{"role": "user", "content": text + MARK}])
    assert done["joined"] == text + MARK


@pytest.mark.parametrize("stop", [".", ".*", "^", "$", "[a-z]", "(", "a|b", "\\d", "(a+)+$", "a{2}", "{{ x }}"])
async def test_a_stop_string_is_its_characters_and_no_pattern(client: Client, stop: str) -> None:
    done = await client.generate(id="without", prompt="aaaaaaaa1ab", stop=stop)
    assert (done["joined"], done["finish_reason"]) == ("aaaaaaaa1ab", "stop")
    assert (await client.generate(id="with", prompt=f"aaa{stop}bbb", stop=[stop]))["joined"] == "aaa"


async def test_a_field_that_names_a_way_into_python_is_a_field_like_any_other(client: Client) -> None:
    fields = {"__class__": MARK, "__init__": {}, "__dict__": {}, "$ref": MARK, "constructor": {"prototype": MARK}}
    with watched():
        assert (await client.generate(prompt="hello", **fields))["joined"] == "hello"
