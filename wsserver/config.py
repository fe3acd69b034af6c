"""The server's settings: one frozen value, from the command line or WSSERVER_* environment variables."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wsserver import origin, protocol

# What can be asked for; what each of them does is said in __main__.py.
COMMANDS = {
    "serve": "serve models, which is what happens if nothing is said",
    "models": "list the models there are, what each takes and whether that fits, without loading any",
    "schema": "print the JSON Schema of all messages",
}
DESCRIPTION = "Streams a language model's tokens over a WebSocket, with a stop button that really stops."
EPILOG = """\
Every option can be set in the environment as well: --max-active as WSSERVER_MAX_ACTIVE,
and so on; the command line wins. Models are folders <vendor>/<model>/ in the models'
folder, in the usual Hugging Face layout, named by <vendor>/<model>; "wsserver models"
lists them, and "wsserver fetch <vendor>/<model>" downloads one. "wsserver ask <question>"
and "wsserver chat" talk to a server that runs. These three have a --help of their own. The
messages are described in protocol.md; "wsserver schema" prints their JSON Schema.

Once there is a key, who comes without one is refused. "wsserver key add NAME" makes one and
puts it into the file of --api-keys-file; one more may be in WSSERVER_API_KEY, and in no
option, because everybody on a machine can read its command lines. On SIGHUP the files of keys
and certificates are read anew.
"""

# How a default is written that is no word or number.
IN_WORDS: dict[Any, str] = {None: "auto", (): "none", "": "none", False: "off", True: "on"}


class BadSetting(Exception):
    """A setting that nothing can be done with; the words name the option, and say why or what to do."""


class Size(int):
    """A number of bytes, written as it is in an option."""

    def __str__(self) -> str:
        power = max(power for power in range(5) if self % 1024**power == 0)
        return f"{self // 1024**power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


@dataclass(frozen=True, slots=True)
class Config:
    """What an operator can set."""

    host: str = "127.0.0.1"
    port: int = 41443
    api_keys_file: str = ""
    auth_timeout: float = 10.0
    max_auth_failures: int = 10
    insecure: bool = False
    open_http: bool = False
    allow_origin: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    models: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    offload: bool = False
    max_active: int = 8
    memory: int | None = None
    kv_memory: int | None = None
    keep_alive: float | None = None
    preload: tuple[str, ...] = ()
    prefill_stretch: float = 3.0
    threads: int | None = None
    decode: str = "eager"
    max_queue: int = 256
    request_timeout: float = 600.0
    step_timeout: float = 120.0
    max_outbox_bytes: int = Size(1 << 20)
    stall_timeout: float = 30.0
    resume_window: float = 120.0
    max_resume_bytes: int = Size(64 << 20)
    max_detached_tokens: int = 2048
    drain_timeout: float = 30.0
    max_message_bytes: int = Size(protocol.MAX_MESSAGE_BYTES)
    max_json_depth: int = 64
    max_connections: int = 1000
    max_connections_per_address: int = 100
    handshakes_per_second: float = 10.0
    handshake_timeout: float = 10.0
    messages_per_second: float = 50.0
    max_requests_per_connection: int = 256
    max_requests_per_key: int = 256
    max_queued_per_key: int = 128
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    tokens_per_minute: int = 1_000_000
    share_prefixes: bool = True
    log_level: str = "info"
    log_content: bool = False
    echo_path: bool = False


def parse(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[str, Config]:
    """Give the command, one of `COMMANDS`, and the settings; exits with a message for what cannot be."""
    parser = _parser(environment)
    values = vars(parser.parse_args(arguments))
    command: str = values.pop("command")
    return command, Config(**values)


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsserver",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --api-key would be --api-keys-file, and its value be told as a file's name
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=COMMANDS,
        default="serve",
        help="; ".join(f"{name}: {what}" for name, what in COMMANDS.items()),
    )
    defaults: dict[str, Any] = {f.name: f.default for f in fields(Config)}

    def option(name: str, help: str, **details: Any) -> None:
        key = name.replace("-", "_")
        shown = str(IN_WORDS.get(defaults[key], defaults[key]))
        # argparse runs a string default through `type`, so a bad value in the environment is refused like a bad option.
        default = environment.get(f"WSSERVER_{key.upper()}", shown)
        parser.add_argument(f"--{name}", default=default, help=f"{help} (default: {shown})", **details)

    option("host", "address to listen on", metavar="ADDRESS")
    option("port", "port to listen on, 0 for any free one", type=_port, metavar="N")
    option("api-keys-file", "file of the keys that are let in, which `wsserver key` writes", type=_file, metavar="FILE")
    option(
        "auth-timeout", "seconds in which a client that connected without its key has to send it", type=_span, metavar="S"
    )
    option(
        "max-auth-failures",
        "wrong keys from one address in a minute, after which it is refused for a minute",
        type=_positive,
        metavar="N",
    )
    option(
        "insecure",
        "whether the server may listen on an address that others reach though it has no keys: on, off",
        type=_switch,
        metavar="ON",
    )
    option(
        "open-http",
        "whether plain HTTP needs no key where WebSockets do: on, off; /healthz and /readyz never need one",
        type=_switch,
        metavar="ON",
    )
    option(
        "allow-origin",
        "origins whose pages may connect beside the server's own, with commas between them, like https://chat.example.com; "
        "null is that of a page opened as a file, and of any page that hides its own",
        type=_origins,
        metavar="ORIGINS",
    )
    option(
        "allow-host",
        "names, with a port or for any, under which the server is known beside localhost, with commas between them; "
        "all are let in where it listens on no loopback address and nothing is said here",
        type=_hosts,
        metavar="HOSTS",
    )
    option("tls-cert", "file of the certificates for TLS, the server's own first", type=_file, metavar="FILE")
    option("tls-key", "file of the key of the first of them", type=_file, metavar="FILE")
    option("model", "model of a connection that asks for none", metavar="VENDOR/MODEL")
    option(
        "models",
        "folder that holds the models, and drop-ins of your own; auto is LLM, where the server's own drop-ins are",
        type=_folder,
        metavar="DIR",
    )
    option(
        "device",
        "where models run: auto, cpu, cuda, cuda:N; auto is the GPU if there is one",
        type=_device,
        metavar="DEVICE",
    )
    option(
        "dtype",
        "precision: auto is the model's own on a GPU; on a CPU bfloat16 where both have it, else float32",
        type=_dtype,
        metavar="DTYPE",
    )
    option(
        "quantization",
        "how models are quantised while they are loaded: none, int8, nf4, fp4; the last two take a quarter of the memory",
        type=_quantization,
        metavar="HOW",
    )
    option(
        "offload",
        "whether a model that the GPUs have no room for may lie in the CPU's memory in part, and be slow: on, off",
        type=_switch,
        metavar="ON",
    )
    option("max-active", "generations that run at once on a model; more wait in line", type=_positive, metavar="N")
    option(
        "memory",
        "memory that the models on a device may take together, like 20GB; auto is 90 %% of what it has",
        type=_size,
        metavar="SIZE",
    )
    option(
        "kv-memory",
        "memory of a model's KV cache, like 512MiB or 20GB; auto is 1GiB on a CPU, 90 %% of what is free on a GPU",
        type=_size,
        metavar="SIZE",
    )
    option(
        "keep-alive",
        "seconds that a model stays loaded which nobody uses; auto is until another one needs its room",
        type=_keep_alive,
        metavar="S",
    )
    option(
        "preload",
        "models to load at the start beside the default one, with commas between them",
        type=_names,
        metavar="MODELS",
    )
    option(
        "prefill-stretch",
        "how much longer than a decode step one may take that carries prompts too, 1 or more",
        type=_stretch,
        metavar="X",
    )
    option("threads", "threads of a model on a CPU; auto is one less than there are cores", type=_count, metavar="N")
    option(
        "decode",
        "how a model decodes: eager; on a GPU graph, for CUDA graphs with a kernel of their own, launched one step ahead; "
        "on a CPU compiled, for a stream that runs alone, where a C++ compiler is at hand",
        type=_decode,
        metavar="HOW",
    )
    option("max-queue", "requests that may wait in line for a model; one too many is refused", type=_positive, metavar="N")
    option("request-timeout", "seconds that a request may take, its wait in line included", type=_span, metavar="S")
    option(
        "step-timeout",
        "seconds after which a step of a model counts as hung; the model is loaded anew",
        type=_span,
        metavar="S",
    )
    option("max-outbox-bytes", "memory for what one client has not read yet, like 1MiB", type=_bytes, metavar="SIZE")
    option("stall-timeout", "seconds after which a client that takes nothing is given up", type=_span, metavar="S")
    option(
        "resume-window",
        "seconds that a resumable generation can be taken up after its connection was lost, or after its end",
        type=_span,
        metavar="S",
    )
    option(
        "max-resume-bytes", "memory for what all resumable generations have said, like 64MiB", type=_bytes, metavar="SIZE"
    )
    option("max-detached-tokens", "tokens a resumable generation makes while nobody listens", type=_positive, metavar="N")
    option(
        "drain-timeout",
        "seconds from SIGTERM to the end; running generations may finish until shortly before",
        type=_seconds,
        metavar="S",
    )
    option("max-message-bytes", "how long a client's message may be, like 256KiB", type=_bytes, metavar="SIZE")
    option("max-json-depth", "levels that a client's message may nest", type=_positive, metavar="N")
    option("max-connections", "connections at once, those in their handshake included", type=_positive, metavar="N")
    option("max-connections-per-address", "connections at once from one address", type=_positive, metavar="N")
    option(
        "handshakes-per-second",
        "new connections from one address a second; those of ten seconds may come at once",
        type=_rate,
        metavar="X",
    )
    option("handshake-timeout", "seconds after which a handshake that is not finished is given up", type=_span, metavar="S")
    option(
        "messages-per-second",
        "messages that a connection may send a second, a long one counted once more for every 4KiB; those of ten seconds "
        "may come at once",
        type=_rate,
        metavar="X",
    )
    option("max-requests-per-connection", "requests of one connection that run or wait", type=_positive, metavar="N")
    option(
        "max-requests-per-key",
        "requests of one key that run or wait; without keys this and what follows is for each address",
        type=_positive,
        metavar="N",
    )
    option("max-queued-per-key", "of these, those that wait", type=_positive, metavar="N")
    option("max-prompt-tokens", "tokens of a prompt; auto is what the context has room for", type=_count, metavar="N")
    option("max-tokens", "tokens of an answer; auto is what the context has room for", type=_count, metavar="N")
    option("tokens-per-minute", "tokens of prompts and answers for one key a minute", type=_positive, metavar="N")
    option(
        "share-prefixes",
        "whether a prompt may begin with what another key's left in the KV cache, which its timing tells: on, off",
        type=_switch,
        metavar="ON",
    )
    option("log-level", "how much to log: debug, info, warning, error", type=_log_level, metavar="LEVEL")
    option("log-content", "log prompts and answers, at level debug: on, off", type=_switch, metavar="ON")
    option("echo-path", "answer every message at /echo with itself, for protocol tests: on, off", type=_switch, metavar="ON")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _count(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _size(text: str) -> int | None:
    return None if text == "auto" else _bytes(text)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use a number with MB, GB, MiB or GiB, like 2GiB")
    base = 1024 if "i" in found[2] else 1000
    return int(float(found[1]) * base ** "BKMGT".index(found[2][0]))


def _keep_alive(text: str) -> float | None:
    return None if text == "auto" else _seconds(text)


def _folder(text: str) -> Path | None:
    if text == "auto":
        return None
    if not text or not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder; make it, and put models into it at <vendor>/<model>/")
    return Path(text)


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())


def _file(text: str) -> str:
    if text == "none":
        return ""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file")
    return text


def _origins(text: str) -> tuple[str, ...]:
    for name in _names(text):
        if origin.normal_origin(name) is None:
            raise argparse.ArgumentTypeError(f"{name!r} is no origin; use one like https://chat.example.com, or null")
    return _names(text)


def _hosts(text: str) -> tuple[str, ...]:
    for name in _names(text):
        if not origin.is_host(name):
            raise argparse.ArgumentTypeError(f"{name!r} is no host; use one like chat.example.com or localhost:8080")
    return _names(text)


def _stretch(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more, like 3 or 2.5")
    return float(text)


def _rate(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number over 0, like 10 or 0.5")
    return float(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; use 0 or more, like 2.5")
    return float(text)


def _span(text: str) -> float:
    if not _seconds(text):
        raise argparse.ArgumentTypeError("0 is too short; use a number of seconds over 0, like 2.5")
    return _seconds(text)


def _device(text: str) -> str:
    if not re.search(protocol.DEVICE, text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(protocol.CHOICES['device'])}")
    return text


def _dtype(text: str) -> str:
    return _choice(text, protocol.CHOICES["dtype"])


def _quantization(text: str) -> str:
    return _choice(text, protocol.CHOICES["quantization"])


def _switch(text: str) -> bool:
    return _choice(text, ("on", "off")) == "on"


def _decode(text: str) -> str:
    return _choice(text, ("eager", "graph", "compiled"))


def _log_level(text: str) -> str:
    return _choice(text, ("debug", "info", "warning", "error"))


def _choice(text: str, choices: Sequence[str]) -> str:
    # Not argparse's `choices`: those are not applied to a default, and so not to the environment.
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
    return text
