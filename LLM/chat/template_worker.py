"""The process that renders chat templates: reads requests on stdin, and writes answers to stdout. Knows jinja2 alone.

A frame is four bytes of length, big-endian, and JSON in UTF-8. A template is code that an operator downloaded: here it can
take time and memory from nothing else, and whoever started the process can kill it.
"""

import json
import os
import select
import struct
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import fcntl
    import resource
except ImportError:  # not to be had on every platform
    fcntl = resource = None  # type: ignore[assignment]

LENGTH = struct.Struct(">I")
# Bytes of address space, and characters of output, to which each byte of a request adds.
MEMORY, MEMORY_PER_BYTE = 512 << 20, 32
OUTPUT, OUTPUT_PER_BYTE = 4 << 20, 8
LONGEST_REFUSAL = 1000  # characters of what a template says against a conversation


def main() -> None:
    """Answer requests until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, {"ready": True})
    while header := requests.read(LENGTH.size):
        payload = requests.read(LENGTH.unpack(header)[0])
        _end_with(requests, True)
        answer = _answer(payload)
        _end_with(requests, False)
        _write(answers, answer)


def _end_with(requests: BinaryIO, now: bool) -> None:
    """Have the system end this process by SIGIO once stdin ends, or no more: nothing else comes there during a render."""
    if fcntl is not None:
        fcntl.fcntl(requests, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(requests, fcntl.F_GETFL) & ~os.O_ASYNC
        fcntl.fcntl(requests, fcntl.F_SETFL, flags | os.O_ASYNC if now else flags)
        if now and select.select([requests], [], [], 0)[0]:
            sys.exit()  # it had ended before


def _write(stream: BinaryIO, answer: dict[str, Any]) -> None:
    payload = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(LENGTH.pack(len(payload)) + payload)
    stream.flush()


def _answer(payload: bytes) -> dict[str, Any]:
    request = json.loads(payload.decode("utf-8", "surrogatepass"))
    _limit(request["seconds"], len(payload))
    try:
        parts = _compiled(request["template"]).generate(**request["values"])
        text = _joined(parts, OUTPUT + OUTPUT_PER_BYTE * len(payload))
    except jinja2.TemplateError as error:
        return {"refused": str(error)[:LONGEST_REFUSAL]}
    except MemoryError:
        return {"failed": "memory"}
    except RecursionError:
        return {"failed": "recursion"}
    except Exception as error:  # whatever the template's own code raises
        return {"raised": type(error).__name__}
    return {"failed": "output"} if text is None else {"text": text}


def _joined(parts: Iterable[str], most: int) -> str | None:
    kept, size = [], 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > most:
            return None
    return "".join(kept)


def _limit(seconds: float, request_bytes: int) -> None:
    """Bound what the next render may take, also where nobody is left who would kill this process."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime + seconds) + 2
    memory = MEMORY + MEMORY_PER_BYTE * request_bytes
    for kind, most in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, memory)):
        hard = resource.getrlimit(kind)[1]
        try:
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        except (ValueError, OSError):  # a system that has no such limit; the parent's time limit holds
            continue


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Make what templates are written for: transformers' environment."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`generation` marks an answer's text, for training; here it only writes what is in it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Read up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the type's attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Do as the type's method does."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that could reach Python's own."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        for name in (named := dict(*rest, **values)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a namespace takes no name that begins with an underscore")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
