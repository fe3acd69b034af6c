import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from wsserver.config import COMMANDS, Config, parse
from wsserver.option_values import Size

# Every option, with a value that is not its default, as it is written and as it is read.
OPTIONS: dict[str, tuple[str, object]] = {
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "api_keys_file": ("pyproject.toml", "pyproject.toml"),
    "auth_timeout": ("2.5", 2.5),
    "max_auth_failures": ("3", 3),
    "insecure": ("on", True),
    "open_http": ("on", True),
    "page": ("off", False),
    "allow_origin": ("https://a.b, null", ("https://a.b", "null")),
    "allow_host": ("a.b, [::2]:80", ("a.b", "[::2]:80")),
    "tls_cert": ("pyproject.toml", "pyproject.toml"),
    "tls_key": ("pyproject.toml", "pyproject.toml"),
    "model": ("wsserver/echo", "wsserver/echo"),
    "models": ("tests", Path("tests")),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("bfloat16", "bfloat16"),
    "quantization": ("nf4", "nf4"),
    "offload": ("on", True),
    "max_active": ("3", 3),
    "max_active_per_client": ("2", 2),
    "memory": ("20GB", 20 * 10**9),
    "kv_memory": ("1.5GiB", 3 << 29),
    "keep_alive": ("600", 600.0),
    "preload": ("wsserver/echo, a/b", ("wsserver/echo", "a/b")),
    "pin": ("wsserver/echo, a/b", ("wsserver/echo", "a/b")),
    "max_models": ("3", 3),
    "load_timeout": ("60", 60.0),
    "prefill_stretch": ("1.5", 1.5),
    "threads": ("2", 2),
    "decode": ("graph", "graph"),
    "max_queue": ("2", 2),
    "request_timeout": ("1.5", 1.5),
    "step_timeout": ("2.5", 2.5),
    "template_timeout": ("2.5", 2.5),
    "max_outbox_bytes": ("64KiB", 65536),
    "stall_timeout": ("3", 3.0),
    "resume_window": ("4", 4.0),
    "max_resume_bytes": ("1GB", 10**9),
    "max_detached_tokens": ("5", 5),
    "drain_timeout": ("0.5", 0.5),
    "max_message_bytes": ("64KiB", 65536),
    "max_json_depth": ("9", 9),
    "max_connections": ("20", 20),
    "max_connections_per_address": ("4", 4),
    "handshakes_per_second": ("0.5", 0.5),
    "handshake_timeout": ("2", 2.0),
    "messages_per_second": ("7.5", 7.5),
    "max_requests_per_connection": ("6", 6),
    "max_requests_per_key": ("7", 7),
    "max_queued_per_key": ("8", 8),
    "max_prompt_tokens": ("4096", 4096),
    "max_tokens": ("512", 512),
    "tokens_per_minute": ("6000", 6000),
    "client_loads": ("listed", "listed"),
    "allow_load": ("wsserver/echo, a/b", ("wsserver/echo", "a/b")),
    "loads_per_minute": ("3", 3),
    "max_models_per_client": ("1", 1),
    "share_prefixes": ("off", False),
    "mqtt_url": ("mqtt://me@broker", "mqtt://me@broker"),
    "mqtt_root": ("llm/kitchen", "llm/kitchen"),
    "mqtt_reply_topics": ("a/b, c", ("a/b", "c")),
    "mqtt_interval": ("0.1", 0.1),
    "mqtt_messages_per_second": ("20", 20.0),
    "mqtt_ca": ("pyproject.toml", "pyproject.toml"),
    "mqtt_cert": ("pyproject.toml", "pyproject.toml"),
    "mqtt_key": ("pyproject.toml", "pyproject.toml"),
    "log_level": ("debug", "debug"),
    "log_content": ("on", True),
    "echo_path": ("on", True),
}
BAD = [
    ("port", "abc"),
    ("port", ""),
    ("port", "1.5"),
    ("port", "-1"),
    ("port", "65536"),
    ("api_keys_file", ""),
    ("api_keys_file", "/no/such/file"),
    ("api_keys_file", "tests"),
    ("auth_timeout", "0"),
    ("auth_timeout", "never"),
    ("max_auth_failures", "0"),
    ("insecure", "true"),
    ("insecure", ""),
    ("open_http", "yes"),
    ("page", "yes"),
    ("allow_origin", "*"),
    ("allow_origin", "https://*.example.com"),
    ("allow_origin", "https://example.com/"),
    ("allow_origin", "example.com"),
    ("allow_origin", "https://a.b, c"),
    ("allow_host", "*"),
    ("allow_host", "https://example.com"),
    ("allow_host", "example.com:"),
    ("allow_host", "::1"),
    ("tls_cert", ""),
    ("tls_cert", "/no/such/file"),
    ("tls_key", "/no/such/file"),
    ("models", ""),
    ("models", "/no/such/folder"),
    ("models", "pyproject.toml"),
    ("device", "gpu"),
    ("device", "cuda:"),
    ("device", ""),
    ("dtype", "float8"),
    ("dtype", "FLOAT32"),
    ("quantization", "int4"),
    ("offload", "yes"),
    ("client_loads", "on"),
    ("load_timeout", "0"),
    ("memory", "half"),
    ("keep_alive", "-1"),
    ("keep_alive", "forever"),
    ("kv_memory", "1"),
    ("kv_memory", "0GB"),
    ("kv_memory", "2 GiB"),
    ("kv_memory", "-1GB"),
    ("kv_memory", "lots"),
    ("prefill_stretch", "0.9"),
    ("prefill_stretch", "inf"),
    ("prefill_stretch", "-2"),
    ("threads", "0"),
    ("threads", "all"),
    ("decode", "fast"),
    ("max_active", "0"),
    ("max_active_per_client", "0"),
    ("max_active", "-3"),
    ("max_active", "many"),
    ("max_queue", "0"),
    ("request_timeout", "0"),
    ("request_timeout", "never"),
    ("step_timeout", "0.0"),
    ("template_timeout", "0"),
    ("mqtt_interval", "often"),
    ("mqtt_messages_per_second", "0"),
    ("mqtt_ca", "/no/such/file"),
    ("mqtt_cert", "/no/such/file"),
    ("mqtt_key", "/no/such/file"),
    ("max_outbox_bytes", "1048576"),
    ("max_outbox_bytes", "auto"),
    ("stall_timeout", "0"),
    ("stall_timeout", "inf"),
    ("resume_window", "0"),
    ("max_resume_bytes", "auto"),
    ("max_resume_bytes", "0MiB"),
    ("max_detached_tokens", "0"),
    ("max_detached_tokens", "1.5"),
    ("drain_timeout", "-1"),
    ("drain_timeout", "soon"),
    ("drain_timeout", "nan"),
    ("drain_timeout", "inf"),
    ("max_message_bytes", "0KiB"),
    ("max_message_bytes", "262144"),
    ("max_json_depth", "0"),
    ("max_connections", "0"),
    ("max_connections_per_address", "-1"),
    ("handshakes_per_second", "0"),
    ("handshakes_per_second", "inf"),
    ("handshake_timeout", "0"),
    ("messages_per_second", "0.0"),
    ("messages_per_second", "many"),
    ("max_requests_per_connection", "0"),
    ("max_requests_per_key", "none"),
    ("max_queued_per_key", "0"),
    ("max_prompt_tokens", "0"),
    ("max_tokens", "all"),
    ("tokens_per_minute", "0"),
    ("tokens_per_minute", "1e6"),
    ("share_prefixes", "maybe"),
    ("log_level", "loud"),
    ("log_content", "yes"),
    ("echo_path", "yes"),
]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    return "WSSERVER_" + name.upper()


def written(default: object) -> str:
    words = {None: "auto", (): "none", "": "none", False: "off", True: "on"}
    return words.get(default, str(default))  # type: ignore[call-overload, no-any-return]


def refused(arguments: Sequence[str], environment: Mapping[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(arguments, environment)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_this_file_knows_every_option() -> None:
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(Config)}


def test_without_arguments_the_defaults_are_served() -> None:
    expected = Config(
        host="127.0.0.1",
        port=41443,
        api_keys_file="",
        auth_timeout=10.0,
        max_auth_failures=10,
        insecure=False,
        open_http=False,
        page=True,
        allow_origin=(),
        allow_host=(),
        tls_cert="",
        tls_key="",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        models=None,
        device="auto",
        dtype="auto",
        max_active=8,
        max_active_per_client=None,
        memory=None,
        kv_memory=None,
        keep_alive=None,
        preload=(),
        prefill_stretch=3.0,
        threads=None,
        decode="auto",
        max_queue=256,
        request_timeout=600.0,
        step_timeout=120.0,
        template_timeout=2.0,
        max_outbox_bytes=1_048_576,
        stall_timeout=30.0,
        resume_window=120.0,
        max_resume_bytes=67_108_864,
        max_detached_tokens=2048,
        drain_timeout=30.0,
        max_message_bytes=262_144,
        max_json_depth=64,
        max_connections=2000,
        max_connections_per_address=400,
        handshakes_per_second=10.0,
        handshake_timeout=10.0,
        messages_per_second=50.0,
        max_requests_per_connection=256,
        max_requests_per_key=256,
        max_queued_per_key=128,
        max_prompt_tokens=None,
        max_tokens=None,
        tokens_per_minute=1_000_000,
        share_prefixes=True,
        mqtt_url="",
        mqtt_root=None,
        mqtt_reply_topics=(),
        mqtt_interval=0.05,
        mqtt_messages_per_second=500.0,
        mqtt_ca="",
        mqtt_cert="",
        mqtt_key="",
        log_level="info",
        log_content=False,
        echo_path=False,
    )
    assert parse([], {}) == ("serve", expected)
    assert parse(["serve"], {"WSSERVER_UNKNOWN": "x", "PORT": "1", "HOST": "h"}) == ("serve", expected)


@pytest.mark.parametrize(
    "name", ["models", "memory", "kv_memory", "keep_alive", "threads", "max_prompt_tokens", "max_tokens", "mqtt_root"]
)
def test_auto_may_be_said(name: str) -> None:
    assert getattr(parse([flag(name), "auto"], {variable(name): OPTIONS[name][0]})[1], name) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("1B", 1), ("2KB", 2000), ("2KiB", 2048), ("0.5MB", 500_000), ("3GB", 3 * 10**9), ("1TiB", 1 << 40)],
)
def test_a_size_is_read_in_its_unit(text: str, size: int) -> None:
    assert parse(["--kv-memory", text], {})[1].kv_memory == size


def test_a_size_is_shown_in_the_largest_unit_that_fits() -> None:
    sizes = [Size(1), Size(1023), Size(1024), Size(3 << 20), Size((1 << 30) + 1024), Size(5 << 40)]
    assert [str(size) for size in sizes] == ["1B", "1023B", "1KiB", "3MiB", "1048577KiB", "5TiB"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_stands_before_or_behind_its_options(command: str) -> None:
    for arguments in ([command, "--port", "0"], ["--port", "0", command]):
        assert parse(arguments, {}) == (command, Config(port=0))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_read_from_the_command_line_and_from_the_environment(name: str) -> None:
    text, value = OPTIONS[name]
    expected = ("serve", dataclasses.replace(Config(), **{name: value}))
    assert parse([flag(name), text], {}) == expected
    assert parse([f"{flag(name)}={text}"], {}) == expected
    assert parse([], {variable(name): text}) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_line_wins_over_the_environment(name: str) -> None:
    text, value = OPTIONS[name]
    default = getattr(Config(), name)
    assert getattr(parse([flag(name), text], {variable(name): written(default)})[1], name) == value
    assert getattr(parse([flag(name), written(default)], {variable(name): text})[1], name) == default


def test_without_an_environment_given_the_process_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSSERVER_PORT", "1234")
    assert parse([])[1].port == 1234


@pytest.mark.parametrize("source", ["the command line", "the environment"])
@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_value_is_refused_by_the_options_name_in_words_for_people(
    name: str, text: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "the environment":
        err = refused([], {variable(name): text}, capsys)
    else:
        err = refused([f"{flag(name)}={text}"], {}, capsys)
    message = err.splitlines()[-1]
    assert flag(name) in message or variable(name) in message
    assert " _" not in message, "a function's name is no help"
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["stop"],
        ["--prot", "1"],
        ["--port"],
        ["serve", "schema"],
        ["--max-active", "1", "2"],
        # A secret does not belong there; nor is this the beginning of another option, which would take that file.
        ["--api-key", "pyproject.toml"],
        ["--api-key=sk-123456789012345678901234567890"],
    ],
)
def test_what_is_no_command_or_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: wsserver" in refused(arguments, {}, capsys)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


def test_help_tells_every_option_with_its_default_and_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no line breaks inside a default
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as exit:
        parse(["--help"], {variable(name): text for name, (text, _) in OPTIONS.items()})
    assert exit.value.code == 0
    lines = " ".join(capsys.readouterr().out.split()).split(" --")
    for name in OPTIONS:
        (told,) = [line for line in lines if line.startswith(flag(name)[2:] + " ") and "default" in line]
        assert f"(default: {written(getattr(Config(), name))})" in told
    assert any("WSSERVER_MAX_ACTIVE" in line for line in lines)
    assert all(f"{name}: {what}" in lines[0] + lines[1] for name, what in COMMANDS.items())
