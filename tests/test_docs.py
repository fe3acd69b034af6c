"""The documents tell the truth: examples decode, tables agree with the code, snippets are the tested files."""

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import msgspec
import pytest

from tests.conftest import running
from wsserver import accepted, arrivals, limits, protocol
from wsserver.config import Config
from wsserver.protocol import CloseCode, ErrorCode, FinishReason, Generate, Init, Resume, ServerMessage
from wsserver.session import Session

ROOT = Path(__file__).parent.parent
PROTOCOL = (ROOT / "protocol.md").read_text()
README = (ROOT / "README.md").read_text()


def examples(side: str) -> list[str]:
    """Give the JSON lines of protocol.md's blocks of one side, "client" or "server"."""
    blocks = re.findall(rf"^```json {side}\n(.*?)^```", PROTOCOL, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def rows(heading: str) -> Iterator[list[str]]:
    """Give the rows, as cells without backticks, of every table whose first header is `heading`."""
    for part in re.split(rf"^\| {heading} \|.*\n\|[-|]+\n", PROTOCOL, flags=re.MULTILINE)[1:]:
        for row in part.splitlines():
            if not row.startswith("|"):
                break
            yield [cell.strip(" `") for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("line", examples("client"))
def test_a_client_example_of_protocol_md_is_a_message_the_server_takes(line: str) -> None:
    message = protocol.decode(line)
    assert set(json.loads(line)) - {"type"} <= {f.name for f in msgspec.structs.fields(message)}


@pytest.mark.parametrize("line", examples("server"))
def test_a_server_example_of_protocol_md_is_a_message_the_server_sends(line: str) -> None:
    example = json.loads(line)
    frame = msgspec.convert(example, ServerMessage, str_keys=True)
    assert json.loads(protocol.encode(frame)) == example, "a field that no frame has"
    jsonschema.validate(example, protocol.schema())


def test_every_message_type_has_an_example() -> None:
    assert {json.loads(line)["type"] for line in examples("client")} == set(protocol.CLIENT_TYPES)
    sent = {t.__struct_config__.tag for t in get_args(ServerMessage)}
    assert {json.loads(line)["type"] for line in examples("server")} == sent


def test_no_json_block_of_protocol_md_goes_unchecked() -> None:
    assert len(re.findall(r"^```json", PROTOCOL, re.MULTILINE)) == len(
        re.findall(r"^```json (?:client|server)$", PROTOCOL, re.MULTILINE)
    )


def test_the_tables_of_protocol_md_are_those_of_the_code() -> None:
    assert {row[0] for row in rows("`finish_reason`")} == set(get_args(FinishReason))
    codes = list(rows("code"))
    assert {c[0] for c in codes if not c[0].isdigit()} == set(get_args(ErrorCode))
    assert {(int(c[0]), c[1]) for c in codes if c[0].isdigit()} == {(c.value, c.name) for c in CloseCode}


def test_the_parameter_tables_name_every_field() -> None:
    fields = {row[0] for row in rows("field")}
    known = {f.name for t in (Generate, Init, Resume) for f in msgspec.structs.fields(t)}
    described_in_prose = {"messages", "prompt", "stream", "resumable"}
    assert fields == known - described_in_prose


@pytest.mark.parametrize(
    ("field", "documented", "good", "bad"),
    [
        ("max_tokens", "1 or more", [1], [0]),
        ("min_tokens", "0 or more", [0], [-1]),
        ("temperature", "0 to 10", [0, 10], [-0.01, 10.01]),
        ("top_k", "0 or more", [0], [-1]),
        ("top_p", "over 0, to 1", [0.01, 1], [0, 1.01]),
        ("min_p", "0 to 1", [0, 1], [-0.01, 1.01]),
        ("repetition_penalty", "0.1 to 10", [0.1, 10], [0, 0.09, 10.01]),
        ("presence_penalty", "-2 to 2", [-2, 2], [-2.01, 2.01]),
        ("frequency_penalty", "-2 to 2", [-2, 2], [-2.01, 2.01]),
        ("logit_bias", '{"token id": -100 to 100}', [{"1": -100, "2": 100}], [{"1": -101}, {"1": 101}]),
        ("seed", "0 to 2^63 - 1", [0, 2**63 - 1], [-1, 2**63]),
        ("stop", "a string, or up to 16, of 1 to 256 characters", ["x" * 256, ["x"] * 16], ["", "x" * 257, ["x"] * 17]),
        ("stop_token_ids", "up to 64 token ids", [[1] * 64], [[1] * 65]),
        ("ignore_eos", "true, false", [True, False], [1]),
        ("logprobs", "0 to 20", [0, 20], [-1, 21]),
    ],
)
def test_a_range_in_protocol_md_is_what_is_taken_and_nothing_beyond(
    field: str, documented: str, good: list[Any], bad: list[Any]
) -> None:
    assert documented in [row[1] for row in rows("field") if row[0] == field]
    for value in good:
        protocol.decode(json.dumps({"type": "generate", "prompt": "x", field: value}))
    for value in bad:
        with pytest.raises(protocol.Refusal) as refusal:
            protocol.decode(json.dumps({"type": "generate", "prompt": "x", field: value}))
        assert refusal.value.message.startswith(f"$.{field}")


def test_the_limits_that_protocol_md_names_are_those_of_the_code() -> None:
    assert f"{protocol.MAX_MESSAGE_BYTES:,} bytes" in PROTOCOL
    bound = Session.__dataclass_fields__["max_bad_messages"].default
    assert f"{bound + 1} bad messages in a row" in PROTOCOL
    assert protocol.SUBPROTOCOL in PROTOCOL


def of_rate(per_second: float, spare: int = 0) -> str:
    return f"{per_second:g} a second, {limits.BURST_SECONDS * per_second + spare:g} at once"


# Limits that follow from an option which is another's.
DERIVED = {
    "new connections of any kind of one address": of_rate(limits.CONNECTIONS_PER_HANDSHAKE * Config().handshakes_per_second),
    "messages of one client, on all its connections": of_rate(limits.CONNECTIONS_HEARD * Config().messages_per_second),
    "resumed answers told to one client, each 4 KiB": of_rate(limits.CONNECTIONS_HEARD * Config().messages_per_second),
    "frames of one connection, pings and pieces of messages included": of_rate(
        limits.FRAMES_PER_MESSAGE * Config().messages_per_second, accepted.SPARE_FRAMES
    ),
    "frames of one address, on all its connections": of_rate(
        limits.CONNECTIONS_HEARD * limits.FRAMES_PER_MESSAGE * Config().messages_per_second
    ),
}


def test_a_limit_of_protocol_md_has_the_default_of_its_option() -> None:
    config = Config()
    in_words = {
        "--max-auth-failures": f"{config.max_auth_failures} a minute",
        "--handshakes-per-second": of_rate(config.handshakes_per_second),
        "--messages-per-second": of_rate(config.messages_per_second),
        "--mqtt-messages-per-second": of_rate(config.mqtt_messages_per_second),
        "--client-loads": config.client_loads,
        "--loads-per-minute": f"{config.loads_per_minute} a minute",
        "--tokens-per-minute": f"{config.tokens_per_minute:,} a minute",
        "--max-active-per-client": "half",
        "--max-prompt-tokens": "what the context has room for",
        "--max-tokens": "what the context has room for",
    }
    for limit, default, option, _ in rows("limit"):
        if option != "-" and limit not in DERIVED:
            value = getattr(config, option[2:].replace("-", "_"))
            assert default in ([in_words[option]] if option in in_words else [f"{value:.0f}", f"{value:,}"]), option


def test_a_limit_of_protocol_md_without_an_option_is_the_code_s() -> None:
    fixed = {default for _, default, option, _ in rows("limit") if option == "-"}
    bad_messages = Session.__dataclass_fields__["max_bad_messages"].default
    assert fixed == {f"{arrivals.MAX_REQUEST_BYTES:,}", f"{bad_messages}", "128", "16, 256", "20"}
    told = {limit: default for limit, default, *_ in rows("limit")}
    assert {limit: told[limit] for limit in DERIVED} == DERIVED


def test_every_option_that_bounds_a_client_is_among_the_limits_of_protocol_md() -> None:
    timeouts = "(auth|handshake|load|request|stall|template)_timeout"
    bounds = re.compile(f"max_(?!active)|_per_|_window|client_loads|{timeouts}")
    options = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Config) if bounds.search(f.name)}
    assert {option for _, _, option, _ in rows("limit")} == options | {"-"}


def test_the_options_that_the_readme_lists_are_those_there_are() -> None:
    listed = set(re.findall(r"^\| `(--[a-z-]+)` \| `([A-Z_]+)` \| `(.*?)` \|$", README, re.MULTILINE))
    words: dict[Any, str] = {None: "auto", (): "none", "": "none", False: "off", True: "on"}
    names = {f.name: words.get(f.default, str(f.default)) for f in dataclasses.fields(Config)}
    assert listed == {(f"--{n.replace('_', '-')}", f"WSSERVER_{n.upper()}", default) for n, default in names.items()}


def test_the_map_in_the_readme_names_every_file() -> None:
    packages = {
        path.parent for top in ("wsserver", "wsserver_mqtt", "handlers", "LLM") for path in (ROOT / top).rglob("__init__.py")
    }
    for package in [*packages, ROOT / "wsserver/web"]:
        for path in [*package.glob("*.py"), *package.glob("*.js")]:
            if path.name != "__init__.py" and not path.name.startswith("model_srv_"):
                assert re.search(rf"\b{path.name}\b", README), f"{path} is not on the map"
    for name in re.findall(r"\b[a-z_]+\.(?:py|js)\b", README[README.index("## The map") :]):
        assert any(list(ROOT.glob(f"{above}/{name}")) for above in ("*", "*/*", "*/*/*")), f"{name} on the map is gone"


def test_the_python_example_in_the_readme_is_the_file_that_is_run() -> None:
    code = (ROOT / "examples/stream_and_stop.py").read_text()
    assert code[code.index("async def main") :].rstrip() in README


def test_the_shells_example_in_the_readme_is_the_file() -> None:
    assert (ROOT / "examples/one_answer.sh").read_text().splitlines()[-1] in README


def test_the_browser_example_in_the_readme_is_the_file() -> None:
    page = (ROOT / "examples/stream_and_stop.html").read_text()
    script = re.search(r'<script type="module">\n(.*?)</script>', page, re.DOTALL)
    assert script is not None
    lines = [line.removeprefix("  ") for line in script[1].splitlines()]
    assert "\n".join(lines) in README


async def test_the_python_example_streams_and_stops() -> None:
    async with running() as server:
        example = str(ROOT / "examples/stream_and_stop.py")
        beside = os.environ | {"PYTHONPATH": str(ROOT)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, example, server.url, stdout=subprocess.PIPE, env=beside
        )
        printed, _ = await process.communicate()
    # The echo model repeats the 16 bytes of the prompt and ends; the example cancels only what is longer.
    assert (printed.decode(), process.returncode) == ("Once upon a time\n[stop after 17 tokens]\n", 0)


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name} links to {target}"
