"""`wsserver fetch` as its user sees it: a process that talks to a hub over a socket, and what is in the folder then."""

import errno
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as safetensors_bytes

from LLM import fetch as fetch_module
from LLM._base_model_handler import LoadOptions
from LLM.download.bounds import MAX_RESTARTS, BoundedFile
from LLM.fetch import fetch
from LLM.hub_files import NotFetched
from LLM.listing import list_models
from LLM.loader import load
from tests.conftest import eventually
from tests.hub import Hub, serving_models
from tests.makers import mistral_folder

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "wsserver", "fetch"]
ID = "maker/Tiny-1.0"
Refuse = Callable[..., str]
CHUNK = 10 * 1024 * 1024  # what is written at once
WEIGHTS = safetensors_bytes({"x": np.random.default_rng(1).standard_normal(3_000_000, np.float32)})
FILES = {"README.md": b"hello", "config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}
SMALL = FILES | {"model.safetensors": safetensors_bytes({"x": np.ones(8, np.float32)})}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_models() as hub:
        yield hub


class Fetching:
    """A started command, and what it says."""

    def __init__(self, hub: Hub, models: Path, *arguments: str, stderr: int = subprocess.PIPE, **environment: str) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WSSERVER_"))}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(models / "home"), "NO_PROXY": "127.0.0.1"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=inherited | own | {"WSSERVER_MODELS": str(models)} | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def ends(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def fetched(hub: Hub, models: Path, *arguments: str, **environment: str) -> str:
    """Run the command to its good end; give what it said on the way."""
    code, out, err = Fetching(hub, models, *arguments, **environment).ends()
    assert code == 0, err
    assert out.startswith(f"fetched {ID} into {models / ID}\n")
    assert sorted(path.name for path in models.iterdir() if path.name != "home") == ["maker"]
    return err


def refused(hub: Hub, models: Path, *arguments: str, **environment: str) -> str:
    """Run the command to its bad end; give the one line that it said last."""
    code, out, err = Fetching(hub, models, *arguments, **environment).ends()
    assert (code, out) == (1, ""), err
    assert "Traceback" not in err
    return one_line(err.splitlines()[-1], models)


@pytest.fixture
def refuse(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Give what does the same in this process, which is quicker."""
    monkeypatch.setattr(fetch_module, "HUB", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def refuse(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            fetch_module.main(["--models", str(tmp_path), *arguments])
        assert capsys.readouterr().out == ""
        assert isinstance(exit.value.code, str), "that is status 1, and the message"
        return one_line(exit.value.code, tmp_path)

    return refuse


def one_line(message: str, models: Path) -> str:
    assert message.startswith("wsserver fetch: ")
    assert "\n" not in message
    assert not list(models.glob("*/*/config.json"))
    return message


def silent(stage: str, progress: float) -> None:
    pass


def held(models: Path) -> dict[str, bytes]:
    return {str(path.relative_to(models / ID)): path.read_bytes() for path in (models / ID).rglob("*") if path.is_file()}


# The way of a model.


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Give the files of a small Mistral, with all that real repositories hold beside them."""
    folder = mistral_folder(tmp_path_factory.mktemp("published"))
    useful = {path.name: path.read_bytes() for path in folder.iterdir()} | {"LICENSE": b"free", "README.md": b"# Tiny"}
    others = [
        "pytorch_model.bin",
        "modeling_tiny.py",
        "consolidated.safetensors",
        "original/model.safetensors",
        "model.onnx",
    ]
    return useful | dict.fromkeys(others, b"not wanted") | {"tiny.gguf": b"neither"}


def test_a_fetched_model_is_listed_and_loaded(hub: Hub, tmp_path: Path, published: dict[str, bytes]):
    hub.add(ID, published)
    err = fetched(hub, tmp_path, ID)
    wanted = {name: content for name, content in published.items() if content not in (b"not wanted", b"neither")}
    assert held(tmp_path) == wanted
    assert set(hub.downloads()) == wanted.keys()
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert err.count("\n") == len(wanted), "one line a file"
    listed = list_models(tmp_path)[ID]
    assert (listed.folder, listed.problem) == (tmp_path / ID, None)
    assert listed.handler().load(listed.folder, LoadOptions(device="cpu"), silent).vocabulary_size == 32768


def test_a_load_asks_no_hub_for_anything(tmp_path: Path, published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    # The libraries look up this and that of a model for which they find no folder, and hide it when that fails.
    asked = []

    def ask(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)
    for name, content in published.items():
        if "/" not in name:
            (tmp_path / name).write_bytes(content)
    (tmp_path / "consolidated.safetensors").unlink()
    load(tmp_path, LoadOptions(device="cpu"), silent)
    assert asked == []
    with pytest.raises(NotFetched, match="cannot be reached"):
        fetch(ID, tmp_path)
    assert asked, "it would have been seen"


def test_a_revision_is_fetched_as_it_is_named(hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL | {"README.md": b"main"})
    hub.add(ID, SMALL | {"README.md": b"of a branch"}, revision="refs/pr/1")
    fetched(hub, tmp_path, ID, "--revision", "refs/pr/1")
    assert held(tmp_path)["README.md"] == b"of a branch"


def test_the_models_folder_is_where_it_is_said(hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL)
    other = tmp_path / "other"
    code, out, _ = Fetching(hub, tmp_path, ID, "--models", str(other)).ends()
    assert (code, out) == (0, f"fetched {ID} into {other / ID}\nserve it:  wsserver --model {ID} --models {other}\n")
    assert (tmp_path / "other" / ID / "config.json").exists()


def test_one_gguf_file_is_taken_with_the_configuration(refuse: Refuse, hub: Hub, tmp_path: Path):
    hub.add(ID, {"config.json": FILES["config.json"], "q/a-Q4.gguf": b"4", "q/a-Q8.gguf": b"8", "README.md": b"r"})
    assert "--file: q/a-Q4.gguf (1 bytes), q/a-Q8.gguf (1 bytes)" in refuse(ID)
    fetched(hub, tmp_path, ID, "--file", "q/a-Q8.gguf")
    assert held(tmp_path) == {"config.json": FILES["config.json"], "README.md": b"r", "a-Q8.gguf": b"8"}


def test_a_model_that_cannot_be_served_is_said_to_be_one(hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL | {"config.json": b"{}"})
    _, out, _ = Fetching(hub, tmp_path, ID).ends()
    assert "this version cannot serve it: the model's folder cannot be loaded: its config.json names no model_type" in out


def test_a_hub_that_tells_sizes_file_by_file_will_do(hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL, tells_all_at_once=False)
    fetched(hub, tmp_path, ID)
    assert held(tmp_path) == SMALL


def test_a_terminal_is_shown_a_bar(hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    fetching = Fetching(hub, tmp_path, ID, stderr=theirs)
    assert fetching.ends()[0] == 0
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "3/3 model.safetensors: 100%" in shown
    assert "\n3/3 model.safetensors, " not in shown


# What is interrupted goes on.


async def stopped_in_the_middle(hub: Hub, models: Path) -> None:
    """Begin, and press Ctrl-C when the first 10 MiB of the weights are there."""
    hub.waits["model.safetensors"] = CHUNK + 1000
    fetching = Fetching(hub, models, ID)
    await eventually(lambda: any(path.stat().st_size >= CHUNK for path in models.glob(".fetching/*/model.safetensors.*")))
    fetching.process.send_signal(signal.SIGINT)
    code, out, err = fetching.ends()
    hub.let_on.set()
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "wsserver fetch: stopped; run the same command again, it goes on where it stopped"
    assert "Traceback" not in err
    assert list_models(models, {}) == {}


async def test_what_was_stopped_goes_on_where_it_was(hub: Hub, tmp_path: Path):
    hub.add(ID, FILES)
    await stopped_in_the_middle(hub, tmp_path)
    hub.requests.clear()
    fetched(hub, tmp_path, ID)
    assert held(tmp_path) == FILES
    assert set(hub.ranges()) == {f"bytes={CHUNK}-"}
    assert set(hub.downloads()) == {"model.safetensors"}, "what was whole is not fetched again"


async def test_what_another_revision_left_is_not_mixed_in(hub: Hub, tmp_path: Path):
    repository = hub.add(ID, FILES)
    await stopped_in_the_middle(hub, tmp_path)
    repository.files = SMALL
    hub.requests.clear()
    fetched(hub, tmp_path, ID)
    assert held(tmp_path) == SMALL
    assert hub.ranges() == []


def test_a_connection_that_breaks_is_made_again(hub: Hub, tmp_path: Path):
    hub.add(ID, FILES)
    hub.breaks["model.safetensors"] = CHUNK + 1000
    fetched(hub, tmp_path, ID)
    assert held(tmp_path) == FILES
    assert set(hub.ranges()) == {f"bytes={CHUNK}-"}


def test_two_at_once_do_not_break_each_other(hub: Hub, tmp_path: Path):
    hub.add(ID, FILES)
    hub.add("maker/Other", SMALL)
    hub.waits["model.safetensors"] = 1000
    first = Fetching(hub, tmp_path, ID)
    assert hub.reached.wait(30)
    assert "another process is fetching it now" in refused(hub, tmp_path, ID)
    hub.reached.clear()
    other = Fetching(hub, tmp_path, "maker/Other")
    assert hub.reached.wait(30)
    hub.let_on.set()
    assert (first.ends()[0], other.ends()[0]) == (0, 0)
    assert held(tmp_path) == FILES
    assert (tmp_path / "maker/Other/model.safetensors").read_bytes() == SMALL["model.safetensors"]


# What cannot be fetched.


BAD_IDS = ["../x", "a/../b", "a/..", "/etc/passwd", "/etc", "a/b/c", "a\\b", "", ".", "a--b/c", "a/b\n", "-/x"]


@pytest.mark.parametrize("id", BAD_IDS)
def test_a_bad_id_is_refused_and_asks_nobody(refuse: Refuse, hub: Hub, tmp_path: Path, id: str):
    assert refuse("--", id).endswith("; ids look like HuggingFaceTB/SmolLM2-135M-Instruct")
    assert list(tmp_path.iterdir()) == []
    assert hub.requests == []


def test_an_id_without_its_vendor_is_refused(refuse: Refuse):
    assert "lacks its vendor" in refuse("gpt2")


def test_an_unknown_model_is_refused(refuse: Refuse, hub: Hub):
    assert f"{hub.url} has no such model, or a private one; check the id" in refuse("nobody/knows")


def test_an_unknown_revision_is_refused(refuse: Refuse, hub: Hub):
    hub.add(ID, SMALL)
    assert "no revision 'v9'" in refuse(ID, "--revision", "v9")


def test_a_gated_model_is_for_those_with_a_token(refuse: Refuse, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add(ID, SMALL, gated=True)
    for token in ("", "bad"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert f"at {hub.url}/{ID}; ask there, then set HF_TOKEN to your token" in refuse(ID)
    fetched(hub, tmp_path, ID, HF_TOKEN="good")
    assert held(tmp_path) == SMALL


def test_the_token_is_shown_to_the_hub_alone(hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL)
    with serving_models() as elsewhere:
        elsewhere.add(ID, SMALL)
        hub.large_files_at = elsewhere
        fetched(hub, tmp_path, ID, HF_TOKEN="good")
        assert held(tmp_path) == SMALL
        # The library asks the hub for more, once a day.
        assert {request.authorization for request in hub.requests if ID in request.path} == {"Bearer good"}
        assert [request.authorization for request in elsewhere.requests] == [None]


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "check the id"), (410, "wait a while")]
)
def test_a_hub_that_gives_no_reason_is_told_by_its_status(refuse: Refuse, hub: Hub, status: int, advice: str):
    hub.answers_with = status
    assert advice in refuse(ID)


def test_a_host_that_is_no_hub_is_told(refuse: Refuse, hub: Hub):
    hub.answers_with = 200
    assert f"{hub.url} does not answer as a hub does" in refuse(ID)


def test_a_repository_without_weights_to_take_is_refused_before_a_byte_comes(refuse: Refuse, hub: Hub, tmp_path: Path):
    hub.add(ID, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert "no safetensors or GGUF weights" in refuse(ID)
    assert hub.downloads() == []
    assert not (tmp_path / ".fetching").exists()


def test_a_model_that_is_there_is_left_alone(refuse: Refuse, hub: Hub, tmp_path: Path):
    (tmp_path / ID).mkdir(parents=True)
    assert f"is there already, at {tmp_path / ID}; remove that folder" in refuse(ID)
    assert hub.requests == []


def test_a_model_larger_than_the_disk_is_refused_before_a_byte_comes(refuse: Refuse, hub: Hub):
    hub.add(ID, SMALL, sizes={"model.safetensors": 10**18})
    assert "1000000.0 TB are to come, but" in refuse(ID)
    assert hub.downloads() == []


@pytest.mark.parametrize("sent", [b"short", SMALL["model.safetensors"][:-1] + b"!"], ids=["another size", "another hash"])
def test_other_bytes_than_the_hub_told_of_are_thrown_away(refuse: Refuse, hub: Hub, tmp_path: Path, sent: bytes):
    repository = hub.add(ID, SMALL, sent={"model.safetensors": sent})
    message = refuse(ID)
    assert f"model.safetensors came with {len(sent)} bytes that are not the {len(SMALL['model.safetensors'])}" in message
    repository.sent.clear()
    fetch(ID, tmp_path)
    assert held(tmp_path) == SMALL


# A hub that is anybody's.


@pytest.mark.parametrize("length", ["9" * 30, "-5", "many", "1e9", ""])
def test_a_length_that_is_none_is_told_in_a_line(refuse: Refuse, hub: Hub, length: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.add(ID, SMALL, lengths={"config.json": length})
    assert "a hub" in refuse(ID) or "cannot be reached" in refuse(ID)


@pytest.mark.parametrize(("length", "told"), [("9" * 18, "TB are to come, but"), ("9" * 19, "sizes and hashes")])
def test_a_length_that_no_disk_has_is_told_in_a_line(refuse: Refuse, hub: Hub, length: str, told: str):
    hub.add(ID, SMALL, lengths={"config.json": length}, tells_all_at_once=False)
    assert told in refuse(ID)


def test_a_file_that_is_longer_than_was_told_is_cut_off(refuse: Refuse, hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL, sent={"config.json": b"x" * (32 << 20)})
    assert f"config.json is longer than the {len(SMALL['config.json'])} bytes that the hub told of" in refuse(ID)
    assert all(path.stat().st_size <= 100 for path in tmp_path.glob(".fetching/*/config.json.*"))


def test_a_listing_that_does_not_end_is_cut_off(refuse: Refuse, hub: Hub):
    hub.add(ID, SMALL, listed={"description": "x" * (33 << 20)})
    assert "lists it in more than 33.6 MB" in refuse(ID)
    assert hub.downloads() == []


@pytest.mark.parametrize("status", [404, 431, 500])
def test_an_error_that_does_not_end_is_not_read(refuse: Refuse, hub: Hub, status: int):
    hub.answers_with, hub.says = status, b"x" * (8 << 20)
    assert f"answered {status}, and with too long a text" in refuse(ID)


@pytest.mark.parametrize(
    "listed",
    [
        {"siblings": "none"},
        {"siblings": [1]},
        {"siblings": {"a": 1}},
        {"siblings": [{}] * 10_001},
        {"siblings": [{"rfilename": "config.json", "size": 1, "lfs": 7}]},
        {"siblings": [{"rfilename": "config.json", "size": 1, "lfs": {"sha256": 7, "size": 1, "pointerSize": 1}}]},
        {"sha": 7},
        {"sha": "../../x"},
        {"sha": None},
    ],
)
def test_a_listing_that_is_none_is_told_in_a_line(refuse: Refuse, hub: Hub, listed: dict[str, Any]):
    hub.add(ID, SMALL, listed=listed)
    assert "set HF_ENDPOINT to" in refuse(ID)
    assert hub.downloads() == []


@pytest.mark.parametrize("size", [-1, 1.5, "7", True, 1 << 80, []])
def test_a_size_that_is_none_is_told_in_a_line(refuse: Refuse, hub: Hub, size: Any):
    file = {"rfilename": "vocab.json", "size": size, "blobId": "0" * 40}
    hub.add(ID, SMALL, more=[file])
    assert "sizes and hashes" in refuse(ID)


@pytest.mark.parametrize(
    "name",
    ["../config.json.model", "/etc/x.model", "a\x00.model", "\x1b[2J.model", "a\\b.model", "x" * 300 + ".model", "", 7],
)
def test_a_name_that_no_file_may_have_is_passed_over(hub: Hub, tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch_module, "HUB", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.add(ID, SMALL, more=[{"rfilename": name, "size": 1, "blobId": "0" * 40}])
    fetch(ID, tmp_path)
    assert held(tmp_path) == SMALL


def test_a_hub_that_always_begins_again_is_given_up(tmp_path: Path):
    with (tmp_path / "part").open("ab") as file:
        bounded = BoundedFile(file, "config.json", 100)
        for _ in range(MAX_RESTARTS):
            bounded.write(b"x")
            bounded.seek(0)
            bounded.truncate()
        with pytest.raises(NotFetched, match="again and again"):
            bounded.truncate()


def test_a_hub_that_cannot_be_reached_is_told_with_its_address(hub: Hub, tmp_path: Path):
    hub.server_close()
    message = refused(hub, tmp_path, ID)
    assert f"{hub.url} cannot be reached (ConnectError); check the network" in message
    assert "HF_ENDPOINT" in message


def test_a_process_that_is_to_stay_offline_does(hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL)
    assert "HF_HUB_OFFLINE is set" in refused(hub, tmp_path, ID, HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_a_folder_that_cannot_be_made_is_told(refuse: Refuse, hub: Hub, tmp_path: Path):
    hub.add(ID, SMALL)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refuse(ID, "--models", str(tmp_path / "file"))


def test_a_disk_that_fills_up_on_the_way_keeps_what_there_is(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add(ID, SMALL)

    def fills_up(url: str, file: Any, **_: Any) -> None:
        file.write(b"ab")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch_module, "HUB", hub.url)
    monkeypatch.setattr(fetch_module, "http_get", fills_up)
    with pytest.raises(NotFetched, match="the disk is full; make room, then run the same command again"):
        fetch(ID, tmp_path)
    assert [path.read_bytes() for path in tmp_path.glob(".fetching/*/README.md.*")] == [b"ab"]
