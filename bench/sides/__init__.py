"""The sides by name. A new peer is a file that serves requests, and a line here.

A library is called in a child process: its file ends in `serve(load)`, see `generate.py`. A server is a `Side` whose client
the bench has, see `openai.py` and `websocket.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from bench.sides.in_process import InProcess
from bench.sides.openai import OpenAISide, transformers_serve
from bench.sides.process import CACHE
from bench.sides.side import Setting, Side
from bench.sides.websocket import ONE_CLIENT_MAY, WebSocketSide, wsserver

ECHO = "wsserver/echo"
METER = CACHE / "model_seconds"

SIDES: dict[str, Callable[[Setting], Side]] = {
    "wsserver": wsserver,
    "compiled": lambda setting: wsserver(replace(setting, decode="compiled"), name="wsserver, compiled"),
    "generate": lambda setting: InProcess("model.generate + streamer", setting, "bench.sides.generate"),
    "serve": lambda setting: transformers_serve(setting, continuous=False),
    "serve_cb": lambda setting: transformers_serve(setting, continuous=True),
    "cb": lambda setting: InProcess("transformers' continuous batching", setting, "bench.sides.continuous"),
    "cb_best": lambda setting: InProcess("continuous batching, best", setting, "bench.sides.continuous", "best"),
    "llama": lambda setting: InProcess("llama.cpp", setting, "bench.sides.llama_cpp", needs=("llama_cpp",)),
    "loop": lambda setting: InProcess("bare decode loop", setting, "bench.sides.bare_loop"),
    "null_websocket": lambda setting: WebSocketSide("null websocket", setting, "bench.sides.null_server", "websocket"),
    "null_http": lambda setting: OpenAISide("null http", setting, "bench.sides.null_server", "http"),
}


def paced_echo(setting: Setting, milliseconds: float, limits: Mapping[str, str] = ONE_CLIENT_MAY) -> WebSocketSide:
    """Give wsserver with the echo model on a clock."""
    return wsserver(setting, "bench.sides.paced_echo", str(milliseconds), name="wsserver, paced echo", limits=limits)


def metered(setting: Setting) -> WebSocketSide:
    """Give wsserver with a meter on its model's CPU time, which `model_seconds` of METER reads."""
    METER.parent.mkdir(exist_ok=True)
    return wsserver(setting, "bench.sides.metered", str(METER), name="wsserver, metered")
