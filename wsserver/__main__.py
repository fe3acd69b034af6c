"""The command line and composition root: the only file that knows everybody."""

import asyncio
import errno
import gc
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

import orjson

from handlers import dispatcher
from handlers.status import overview
from LLM._base_model_handler import LoadOptions
from LLM.blocking import DefaultExecutor
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.giving_way import giving_way
from LLM.listing import MODELS_ROOT, list_models
from LLM.model import Description, ModelSpec, Waiter
from LLM.model_service import Keeping, ModelService
from LLM.model_table import table
from wsserver import ask, key_command, open_files, protocol, tls
from wsserver.auth import Keys
from wsserver.config import BadSetting, Config, parse
from wsserver.door import see_to_keys
from wsserver.keys_file import read_keys
from wsserver.log_limit import LimitedHandler
from wsserver.server import Server

try:
    from uvloop import new_event_loop
except ImportError:  # not to be had on every platform
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop  # type: ignore[no-redef]

try:
    from wsserver_mqtt.ask import main as ask_over_mqtt
    from wsserver_mqtt.start import make_face
except ImportError:  # of an extra, which is not installed
    make_face = ask_over_mqtt = None  # type: ignore[assignment]

log = logging.getLogger("wsserver")

# Ports that Linux gives to outgoing connections unless told otherwise (net.ipv4.ip_local_port_range).
EPHEMERAL = range(32768, 61000)

NO_MQTT = 'MQTT is an extra that is not installed; pip install "wsserver[mqtt]"'


def main() -> None:
    """Run the command line."""
    match sys.argv[1:]:
        case ["ask", *arguments]:
            sys.exit(ask.main(arguments))
        case ["chat", *arguments]:
            _become("wsserver.chat", arguments)
        case ["fetch", *arguments]:
            _become("LLM.fetch", arguments)
        case ["key", *arguments]:
            key_command.run(arguments)
            return
        case ["mqtt", *arguments]:
            sys.exit(NO_MQTT if ask_over_mqtt is None else ask_over_mqtt(arguments))
    # Whatever the libraries would like to ask a hub for: a client's word never starts a download.
    os.environ["HF_HUB_OFFLINE"] = "1"
    command, config = parse(sys.argv[1:])
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=config.log_level.upper(), format=line, handlers=[LimitedHandler()])
    logging.getLogger("websockets").setLevel(max(logging.WARNING, logging.root.level))
    try:
        COMMANDS[command](config)
    except Refused as refused:
        # What is a field of init to a client is an option of the same name here.
        option = f"--{refused.field}: " if refused.field else ""
        fetched = refused.reason == "model_not_found" and config.models is None
        hint = "; `make install` fetches the default one" if fetched else ""
        sys.exit(f"wsserver: {option}{refused.message}{hint}")


def run_server(config: Config) -> None:
    """Serve until a signal comes; an address that cannot be listened on is told in one line."""
    allowed = open_files.allow(config.max_connections)
    if allowed < config.max_connections:
        log.warning("--max-connections: the system lets this process have %d connections (ulimit -n)", max(allowed, 0))
    # What was imported stays: a full collection would look at each of its objects, some 20 ms in which no stream moves.
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            if runner.run(serve(config)):
                os._exit(0)  # the runner, and Python, would wait for that thread for ever
    except BadSetting as error:
        sys.exit(f"wsserver: {error}")
    except OSError as error:
        sys.exit(f"wsserver: {error}; {_other_address(error, config.port)}")


def _other_address(error: OSError, port: int) -> str:
    """Return what to do where an address cannot be listened on."""
    if error.errno == errno.EADDRINUSE and port in EPHEMERAL:
        # SO_REUSEADDR, which the loop sets, does not help: such a connection is no listener that has ended.
        return (
            "another server has it, or an outgoing connection of this machine, which Linux gives ports of this range "
            f"(sysctl net.ipv4.ip_local_reserved_ports={port} keeps it free); choose another address with --host and --port"
        )
    return "choose another address with --host and --port"


def print_models(config: Config) -> None:
    """Print what is known of the models there are without loading one."""
    _say(table(list_models(config.models or MODELS_ROOT), load_options(config), config.memory))


def print_schema(config: Config) -> None:
    """Print the JSON Schema of all messages."""
    _say(orjson.dumps(protocol.schema(), option=orjson.OPT_INDENT_2).decode())


# What each command of `wsserver.config.COMMANDS` does.
COMMANDS: Mapping[str, Callable[[Config], None]] = {"serve": run_server, "models": print_models, "schema": print_schema}


async def serve(config: Config) -> bool:
    """Serve until SIGTERM or SIGINT, then drain; say whether a thread hangs and was left behind.

    Raises:
        BadSetting: there are no keys where there must be some, or a file of them or of a certificate cannot be used.
        Refused: the default model is not there, or cannot be loaded.
        OSError: the address cannot be listened on.
    """
    executor = DefaultExecutor()
    asyncio.get_running_loop().set_default_executor(executor)
    keys, certified, reads = _secured(config)
    # Always: the signal ends a process that does not ask for it.
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _read_anew, reads)
    root = config.models or MODELS_ROOT
    models = ModelService(config.model, load_options(config), engine_settings(config), root, keeping(config))
    asked = dict.fromkeys([models.resolve(), *map(models.resolve, (*config.pin, *config.preload))])
    for name in config.allow_load:
        models.resolve(name)  # one that is not there is told now
    async with AsyncExitStack() as closing:
        closing.push_async_callback(models.close)
        server = Server(config, dispatcher(models), lambda: models.problem, keys, certified, giving_way)
        await closing.enter_async_context(server)
        if config.mqtt_url:
            await closing.enter_async_context(_face(config, server, keys, models))
        stopping = _stop_on_signal()
        # Clients may come while models load: they wait in line for them, and can cancel.
        load = asyncio.create_task(_load(models, asked))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([load, stopped], return_when=asyncio.FIRST_COMPLETED)
        if load.done():
            _say(f"serving {', '.join(map(_in_words, load.result()))} at {_url(config, server.port)}")
            _say(_how_to_try(config, server.port, keys.required))
            if config.page:
                _say(f"chat: {_page(_url(config, server.port))}")
            await stopped
        load.cancel()
        _say("stopping: running generations may finish")
        await server.drain()
    return models.stuck or executor.busy


def _face(config: Config, server: Server, keys: Keys, models: ModelService) -> AbstractAsyncContextManager[object]:
    """Give the server's other face, on a broker."""
    if make_face is None:
        raise BadSetting(f"--mqtt-url: {NO_MQTT}")
    # Like the key this is for nobody whom this process starts.
    password = os.environ.pop("WSSERVER_MQTT_PASSWORD", None)
    face = make_face(config, password, server, keys, dispatcher(models), partial(overview, server.state, models))
    models.on_event = face.tell
    return face


def engine_settings(config: Config) -> EngineSettings:
    """Give how models run once they are loaded."""
    return EngineSettings(
        config.max_active,
        config.prefill_stretch,
        config.max_queue,
        config.step_timeout,
        config.max_active_per_client,
    )


def keeping(config: Config) -> Keeping:
    """Give which models stay loaded."""
    most, per_client = config.max_models, config.max_models_per_client
    return Keeping(config.memory, config.keep_alive, config.pin, most, per_client, config.load_timeout)


def load_options(config: Config) -> LoadOptions:
    """Give how models are loaded of which a client says nothing else."""
    return LoadOptions(
        config.dtype,
        config.device,
        config.quantization,
        config.offload,
        kv_memory=config.kv_memory,
        threads=config.threads,
        decode=config.decode,
        sequences=config.max_active,
        template_timeout=config.template_timeout,
    )


async def _load(models: ModelService, asked: Iterable[ModelSpec]) -> list[Description]:
    """Load models one after the other, so that none is unloaded for the next; those that do not fit together are refused."""
    async with AsyncExitStack() as use:
        return [(await use.enter_async_context(models.use(spec, Waiter()))).describe() for spec in asked]


def _in_words(model: Description) -> str:
    quantised = "" if model["quantization"] == "none" else f"{model['quantization']} and "
    return f"{model['id']} ({quantised}{model['dtype']} on {model['device']})"


def _stop_on_signal() -> asyncio.Event:
    """Give the event that the first SIGTERM or SIGINT sets; the second one ends the process where it stands."""
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return stopping


def _secured(config: Config) -> tuple[Keys, ssl.SSLContext | None, dict[str, Callable[[], None]]]:
    """Give the keys that are let in, what makes TLS, and by name what reads the files of either anew."""
    # What this process starts gets its environment, and is not to have the key in it.
    read = partial(read_keys, config.api_keys_file, os.environ.pop("WSSERVER_API_KEY", None))
    keys, certified = Keys(read()), tls.server_context(config.tls_cert, config.tls_key)
    see_to_keys(config, keys)
    reads: dict[str, Callable[[], None]] = {}
    if config.api_keys_file:
        reads["file of keys"] = lambda: keys.replace(read())
    if certified:
        reads["certificate"] = partial(tls.load, certified, config.tls_cert, config.tls_key)
    return keys, certified, reads


def _read_anew(reads: Mapping[str, Callable[[], None]]) -> None:
    """Read files anew, for the connections to come; what cannot be read stays as it was."""
    if not reads:
        log.info("SIGHUP: there is no file of keys or certificates to read")
    for what, read in reads.items():
        try:
            read()
            log.info("SIGHUP: the %s was read anew", what)
        except BadSetting as error:
            log.error("SIGHUP: the %s stays as it was: %s", what, error)


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Run another program in this process's place: one that serves never has its code in it."""
    # The packages beside this file, not folders of their names wherever it was started.
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *arguments], environment)


def _url(config: Config, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        config.host, f"[{config.host}]" if ":" in config.host else config.host
    )
    return f"{'wss' if config.tls_cert else 'ws'}://{shown}:{port}/ws"


def _page(url: str) -> str:
    return url.replace("ws", "http", 1).removesuffix("ws")


def _how_to_try(config: Config, port: int, with_key: bool) -> str:
    message = '{"type":"generate","prompt":"The capital of France is","max_tokens":32}'
    key = " -H='Authorization: Bearer KEY'" if with_key else ""
    return f"try:  echo '{message}' | websocat -n{key} '{_url(config, port)}?once=1'"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
