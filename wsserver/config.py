"""The server's settings: one frozen value, from the command line or WSSERVER_* environment variables."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from wsserver import options, protocol
from wsserver.option_values import Size

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

With --mqtt-url the server is on a broker as well, whose password is in WSSERVER_MQTT_PASSWORD;
"wsserver mqtt ask" asks there: its --help tells more.
"""


class BadSetting(Exception):
    """A setting that nothing can be done with; the words name the option, and say why or what to do."""


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
    page: bool = True
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
    max_active_per_client: int | None = None
    memory: int | None = None
    kv_memory: int | None = None
    keep_alive: float | None = None
    preload: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    max_models: int = 8
    load_timeout: float = 1800.0
    prefill_stretch: float = 3.0
    threads: int | None = None
    decode: str = "auto"
    max_queue: int = 256
    request_timeout: float = 600.0
    step_timeout: float = 120.0
    template_timeout: float = 2.0
    max_outbox_bytes: int = Size(1 << 20)
    stall_timeout: float = 30.0
    resume_window: float = 120.0
    max_resume_bytes: int = Size(64 << 20)
    max_detached_tokens: int = 2048
    drain_timeout: float = 30.0
    max_message_bytes: int = Size(protocol.MAX_MESSAGE_BYTES)
    max_json_depth: int = 64
    max_connections: int = 2000
    max_connections_per_address: int = 400
    handshakes_per_second: float = 10.0
    handshake_timeout: float = 10.0
    messages_per_second: float = 50.0
    max_requests_per_connection: int = 256
    max_requests_per_key: int = 256
    max_queued_per_key: int = 128
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    tokens_per_minute: int = 1_000_000
    client_loads: str = "any"
    allow_load: tuple[str, ...] = ()
    loads_per_minute: int = 12
    max_models_per_client: int = 2
    share_prefixes: bool = True
    mqtt_url: str = ""
    mqtt_root: str | None = None
    mqtt_reply_topics: tuple[str, ...] = ()
    mqtt_interval: float = 0.05
    mqtt_messages_per_second: float = 500.0
    mqtt_ca: str = ""
    mqtt_cert: str = ""
    mqtt_key: str = ""
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
    options.add(parser, {f.name: f.default for f in fields(Config)}, environment)
    return parser
