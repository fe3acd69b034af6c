"""The command line's options in their order: what each is called, how it is read, and what its help says.

Knows no settings: the defaults come from whoever asks, by the options' names with underscores.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from wsserver import option_values as values


class Option(NamedTuple):
    """One option."""

    name: str
    read: Callable[[str], Any]
    metavar: str
    help: str


GROUPS = {
    "where it listens, and who may connect": (
        Option("host", str, "ADDRESS", "address to listen on"),
        Option("port", values.port, "N", "port to listen on, 0 for any free one"),
        Option("api-keys-file", values.file, "FILE", "file of the keys that are let in, which `wsserver key` writes"),
        Option("auth-timeout", values.span, "S", "seconds in which a client that connected without its key has to send it"),
        Option(
            "max-auth-failures",
            values.positive,
            "N",
            "wrong keys from one address in a minute, after which it is refused for a minute",
        ),
        Option(
            "insecure",
            values.switch,
            "ON",
            "whether the server may listen on an address that others reach though it has no keys: on, off",
        ),
        Option(
            "open-http",
            values.switch,
            "ON",
            "whether plain HTTP needs no key where WebSockets do: on, off; /healthz, /readyz and the page never need one",
        ),
        Option(
            "page",
            values.switch,
            "ON",
            "whether the chat page is served at /: on, off; it holds no secret, and asks for the key itself",
        ),
        Option(
            "allow-origin",
            values.origins,
            "ORIGINS",
            "origins whose pages may connect beside the server's own, with commas between them, like "
            "https://chat.example.com; null is that of a page opened as a file, and of any page that hides "
            "its own",
        ),
        Option(
            "allow-host",
            values.hosts,
            "HOSTS",
            "names, with a port or for any, under which the server is known beside localhost, with commas between "
            "them; all are let in where it listens on no loopback address and nothing is said here",
        ),
        Option("tls-cert", values.file, "FILE", "file of the certificates for TLS, the server's own first"),
        Option("tls-key", values.file, "FILE", "file of the key of the first of them"),
    ),
    "models": (
        Option("model", str, "VENDOR/MODEL", "model of a connection that asks for none"),
        Option(
            "models",
            values.folder_or_auto,
            "DIR",
            "folder that holds the models, and drop-ins of your own; auto is LLM, where the server's own drop-ins are",
        ),
        Option(
            "device", values.device, "DEVICE", "where models run: auto, cpu, cuda, cuda:N; auto is the GPU if there is one"
        ),
        Option(
            "dtype",
            values.dtype,
            "DTYPE",
            "precision: auto is the model's own on a GPU; on a CPU bfloat16 where both have it, else float32",
        ),
        Option(
            "quantization",
            values.quantization,
            "HOW",
            "how models are quantised while they are loaded: none, int8, nf4, fp4; the last two take a quarter "
            "of the memory",
        ),
        Option(
            "offload",
            values.switch,
            "ON",
            "whether a model that the GPUs have no room for may lie in the CPU's memory in part, and be slow: on, off",
        ),
        Option("max-active", values.positive, "N", "generations that run at once on a model; more wait in line"),
        Option(
            "max-active-per-client",
            values.positive_or_auto,
            "N",
            "of these, those of one client while others wait; auto is half",
        ),
        Option(
            "memory",
            values.size_or_auto,
            "SIZE",
            "memory that the models on a device may take together, like 20GB; auto is 90 %% of what it has",
        ),
        Option(
            "kv-memory",
            values.size_or_auto,
            "SIZE",
            "memory of a model's KV cache, like 512MiB or 20GB; auto is 1GiB on a CPU, 90 %% of what is free on a GPU",
        ),
        Option(
            "keep-alive",
            values.seconds_or_auto,
            "S",
            "seconds that a model stays loaded which nobody uses; auto is until another one needs its room",
        ),
        Option(
            "preload",
            values.names,
            "MODELS",
            "models to load at the start beside the default one, with commas between them",
        ),
        Option(
            "pin",
            values.names,
            "MODELS",
            "models to load at the start and keep loaded, with commas between them; the default one never leaves for others "
            "either",
        ),
        Option("max-models", values.positive, "N", "models loaded at once, one in two precisions counted twice"),
        Option(
            "load-timeout",
            values.span,
            "S",
            "seconds after which the load of a model counts as hung and fails, and so does the reading of its folder",
        ),
        Option(
            "prefill-stretch",
            values.stretch,
            "X",
            "how much longer than a decode step one may take that carries prompts too, 1 or more",
        ),
        Option(
            "threads", values.positive_or_auto, "N", "threads of a model on a CPU; auto is one less than there are cores"
        ),
        Option(
            "decode",
            values.decode,
            "HOW",
            "how a model decodes: eager; on a GPU graph, for CUDA graphs with kernels of their own, launched one "
            "step ahead; on a CPU compiled, for a stream that runs alone, where a C++ compiler is at hand; auto is graph "
            "where a GPU allows it, else eager",
        ),
    ),
    "requests, and clients that do not read": (
        Option("max-queue", values.positive, "N", "requests that may wait in line for a model; one too many is refused"),
        Option("request-timeout", values.span, "S", "seconds that a request may take, its wait in line included"),
        Option(
            "step-timeout",
            values.span,
            "S",
            "seconds after which a step of a model counts as hung, and the model is loaded anew; reading a folder or a "
            "prompt counts as hung then too, and /readyz says so",
        ),
        Option(
            "template-timeout",
            values.span,
            "S",
            "seconds that a model's chat template may take for a conversation; it runs in a process of its own",
        ),
        Option("max-outbox-bytes", values.size, "SIZE", "memory for what one client has not read yet, like 1MiB"),
        Option("stall-timeout", values.span, "S", "seconds after which a client that takes nothing is given up"),
        Option(
            "resume-window",
            values.span,
            "S",
            "seconds that a resumable generation can be taken up after its connection was lost, or after its end",
        ),
        Option("max-resume-bytes", values.size, "SIZE", "memory for what all resumable generations have said, like 64MiB"),
        Option("max-detached-tokens", values.positive, "N", "tokens a resumable generation makes while nobody listens"),
        Option(
            "drain-timeout",
            values.seconds,
            "S",
            "seconds from SIGTERM to the end; running generations may finish until shortly before",
        ),
    ),
    "what one client may have and do": (
        Option("max-message-bytes", values.size, "SIZE", "how long a client's message may be, like 256KiB"),
        Option("max-json-depth", values.positive, "N", "levels that a client's message may nest"),
        Option("max-connections", values.positive, "N", "connections at once, those in their handshake included"),
        Option("max-connections-per-address", values.positive, "N", "connections at once from one address"),
        Option(
            "handshakes-per-second",
            values.rate,
            "X",
            "new WebSockets from one address a second, and ten times as many connections of any kind; those of ten "
            "seconds may come at once",
        ),
        Option("handshake-timeout", values.span, "S", "seconds after which a handshake that is not finished is given up"),
        Option(
            "messages-per-second",
            values.rate,
            "X",
            "messages that a connection may send a second, a long one counted once more for every 4KiB and for every "
            "256 brackets; those of ten seconds may come at once, and one client's connections together may send what ten "
            "may",
        ),
        Option("max-requests-per-connection", values.positive, "N", "requests of one connection that run or wait"),
        Option(
            "max-requests-per-key",
            values.positive,
            "N",
            "requests of one key that run or wait; without keys this and what follows is for each address",
        ),
        Option("max-queued-per-key", values.positive, "N", "of these, those that wait"),
        Option(
            "max-prompt-tokens", values.positive_or_auto, "N", "tokens of a prompt; auto is what the context has room for"
        ),
        Option("max-tokens", values.positive_or_auto, "N", "tokens of an answer; auto is what the context has room for"),
        Option("tokens-per-minute", values.positive, "N", "tokens of prompts and answers for one key a minute"),
        Option(
            "client-loads",
            values.client_loads,
            "WHICH",
            "models that clients may have loaded: off, none; listed, those that are loaded at the start and those allowed "
            "by name, with the server's own dtype, device and quantization; any. What is loaded may be used in any case",
        ),
        Option(
            "allow-load",
            values.names,
            "MODELS",
            "models that clients may have loaded where only listed ones may, with commas between them",
        ),
        Option("loads-per-minute", values.positive, "N", "loads of models that one client may begin a minute"),
        Option(
            "max-models-per-client",
            values.positive,
            "N",
            "loaded models that one client alone uses, the pinned ones not counted",
        ),
        Option(
            "share-prefixes",
            values.switch,
            "ON",
            "whether a prompt may begin with what another key's left in the KV cache, which its timing tells: on, off",
        ),
    ),
    "on an MQTT broker": (
        Option(
            "mqtt-url", values.word, "URL", "broker to serve on as well, like mqtt://user@127.0.0.1, or mqtts:// for TLS"
        ),
        Option(
            "mqtt-root",
            values.word_or_auto,
            "T",
            "topic that all of this server's begin with; auto is llm/ and the host's name",
        ),
        Option(
            "mqtt-reply-topics",
            values.names,
            "TOPICS",
            "topics, with commas between them, under which answers may go that go nowhere below the root's /reply",
        ),
        Option("mqtt-interval", values.seconds, "S", "seconds between two messages of one answer, which merge"),
        Option(
            "mqtt-messages-per-second",
            values.rate,
            "X",
            "messages of all publishers that are read a second, of those without a user in their topic half as many; "
            "one publisher may send as many as a connection; those of ten seconds may come at once, cancels count apart",
        ),
        Option(
            "mqtt-ca", values.file, "FILE", "file of the certificates that the broker's is checked with, if not the system's"
        ),
        Option("mqtt-cert", values.file, "FILE", "file of the certificate that the broker is shown"),
        Option("mqtt-key", values.file, "FILE", "file of that certificate's key"),
    ),
    "logs and tests": (
        Option("log-level", values.log_level, "LEVEL", "how much to log: debug, info, warning, error"),
        Option("log-content", values.switch, "ON", "log prompts and answers, at level debug: on, off"),
        Option("echo-path", values.switch, "ON", "answer every message at /echo with itself, for protocol tests: on, off"),
    ),
}


def add(parser: argparse.ArgumentParser, defaults: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Add every option; what the environment says of one is its default, and is read like what the command line says."""
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            key = option.name.replace("-", "_")
            shown = values.written(defaults[key])
            group.add_argument(
                f"--{option.name}",
                type=option.read,
                # argparse runs a string default through `type`: a bad value in the environment is refused like a bad option.
                default=environment.get(f"WSSERVER_{key.upper()}", shown),
                help=f"{option.help} (default: {shown})",
                metavar=option.metavar,
            )
