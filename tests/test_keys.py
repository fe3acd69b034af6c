"""Keys: how they are made, hashed and kept in a file, and the command that does it."""

import asyncio
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_main import COMMAND, process
from wsserver import key_command, keys_file
from wsserver.auth import MAX_REMEMBERED, WINDOW, Failures, Keys, digest, new_key
from wsserver.config import BadSetting

FILE = Path("keys")
NAMES = st.text("abcXYZ019._-", min_size=1, max_size=64).filter(lambda name: name != "default")
DIGESTS = st.dictionaries(NAMES, st.binary(min_size=32, max_size=32), max_size=8).filter(
    lambda digests: len(set(digests.values())) == len(digests)
)
# What is no line of a key, and may stand between those that are.
IDLE = st.sampled_from(["", "   ", "# alice sha256:" + "0" * 64, "\t# ž", "#"])


# Keys.


def test_a_key_has_256_bits_and_goes_into_a_header_and_a_subprotocol():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key) for key in keys)


@given(st.text())
def test_any_text_may_be_asked_for_and_only_the_key_itself_is_one(text: str):
    key = new_key()
    keys = Keys({"alice": digest(key), "bob": digest(new_key())})
    assert keys.whose(text) is None
    assert keys.whose(key) == "alice"
    assert keys.whose(key + " ") is keys.whose(key[:-1]) is keys.whose(key.upper()) is None


def test_every_key_is_compared_in_constant_time_whichever_is_right(monkeypatch: pytest.MonkeyPatch):
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("wsserver.auth.hmac.compare_digest", compare)
    keys = Keys({name: digest(name) for name in "abc"})
    for key, owner in (("a", "a"), ("c", "c"), ("x", None)):
        assert keys.whose(key) == owner
    assert compared == [digest(name) for name in "abc"] * 3


def test_a_server_that_had_a_key_asks_for_one_when_none_is_left():
    keys = Keys({"alice": digest("a")})
    keys.replace({})
    assert keys.required
    assert keys.whose("a") is None
    assert not Keys({}).required


# The file.


@given(DIGESTS, st.lists(IDLE), st.randoms(use_true_random=False))
def test_what_is_written_is_read_whatever_stands_between(digests: dict[str, bytes], idle: list[str], draw):
    lines = [keys_file.line(name, hashed).rstrip("\n") for name, hashed in digests.items()] + idle
    draw.shuffle(lines)
    assert keys_file.parse("\n".join(lines), FILE) == digests


@given(
    st.text()
    | st.lists(st.sampled_from(["a", " ", "sha256:", "0" * 64, "#", "\n", "default", "\x0b", "\u2028"])).map("".join)
)
def test_any_text_is_read_or_refused_by_its_line_without_repeating_it(text: str):
    try:
        digests = keys_file.parse(text, FILE)
    except BadSetting as error:
        number = int(re.match(r"--api-keys-file: keys, line ([0-9]+): ", str(error))[1])
        assert 1 <= number <= text.count("\n") + 1
    else:
        assert all(keys_file.NAME.fullmatch(name) and len(hashed) == 32 for name, hashed in digests.items())
        assert len(digests) <= text.count("sha256:")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("alice", "no name with a hash"),
        ("alice " + "0" * 64, "no name with a hash"),
        ("alice sha256:" + "0" * 63, "no name with a hash"),
        ("alice sha256:" + "0" * 65, "no name with a hash"),
        ("alice sha256:" + "A" * 64, "no name with a hash"),
        ("a b sha256:" + "0" * 64, "no name with a hash"),
        ("a" * 65 + " sha256:" + "0" * 64, "no name with a hash"),
        ("bob sha256:" + "0" * 64, "is there already"),
        ("alice sha256:" + "1" * 64, "is there already"),
        ("default sha256:" + "0" * 64, "WSSERVER_API_KEY"),
        ("sk-SECRET", "no name with a hash"),
    ],
)
def test_a_line_that_is_no_key_is_refused(line: str, why: str):
    with pytest.raises(BadSetting, match=why) as refused:
        keys_file.parse("bob sha256:" + "1" * 64 + "\n" + line, FILE)
    assert "line 2" in str(refused.value)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    "own", ["", "short-of-sixteen"[:15], "sk-a key with spaces in it", "sk-ž" + "0" * 40, "0" * 32 + "\n"]
)
def test_a_key_of_the_environment_that_could_be_guessed_or_not_sent_is_refused(own: str):
    with pytest.raises(BadSetting, match=r"WSSERVER_API_KEY: .*openssl rand") as refused:
        keys_file.read_keys("", own)
    assert not own or own not in str(refused.value)


def test_the_environment_s_key_is_one_more(tmp_path: Path):
    path = tmp_path / "keys"
    alice = keys_file.add(path, "alice")
    assert keys_file.read_keys("", None) == {}
    assert keys_file.read_keys("", "0" * 16) == {"default": digest("0" * 16)}
    assert keys_file.read_keys(str(path), "0" * 16) == {"alice": digest(alice), "default": digest("0" * 16)}


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["no text", "no file"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadSetting, match=f"--api-keys-file: {path}: "):
        keys_file.read_keys(str(path), None)


# The command.


def run(path: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    key_command.run([*arguments, "--api-keys-file", str(path)], {})
    return capsys.readouterr()


def test_a_key_is_printed_once_and_only_its_hash_is_kept_where_nobody_else_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "keys"
    umask = os.umask(0)
    try:
        out, err = run(path, "add", "alice", capsys=capsys)
    finally:
        os.umask(umask)
    key = out.rstrip("\n")
    assert key not in err
    assert key not in path.read_text()
    assert path.read_text() == f"{keys_file.FIRST_LINE}alice sha256:{digest(key).hex()}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys_file.read(path) == {"alice": digest(key)}


def test_keys_are_listed_by_name_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "keys"
    run(path, "add", "alice", capsys=capsys)
    path.write_text(path.read_text() + "# alice is on holiday\n\nalice2 sha256:" + "0" * 64)  # and no end of line
    run(path, "add", "bob", capsys=capsys)
    assert run(path, "list", capsys=capsys)[0] == "alice\nalice2\nbob\n"
    bobs = path.read_text().splitlines()[-1]
    path.chmod(0o640)
    assert "kill -HUP" in run(path, "remove", "alice", capsys=capsys)[1]
    assert path.read_text() == f"{keys_file.FIRST_LINE}# alice is on holiday\n\nalice2 sha256:{'0' * 64}\n{bobs}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "it is the group's to read, as before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_the_file_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, link = tmp_path / "keys", tmp_path / "link"
    link.symlink_to(path)
    run(link, "add", "alice", capsys=capsys)
    run(link, "remove", "alice", capsys=capsys)
    assert link.is_symlink()
    assert path.read_text() == keys_file.FIRST_LINE


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["add", "alice"], "alice has a key in .* already"),
        (["add", "default"], "'default' cannot be a key's name"),
        (["add", ""], "'' cannot be a key's name"),
        (["add", "a b"], "'a b' cannot be"),
        (["add", "a\nb"], r"'a\\nb' cannot be"),
        (["add", "#a"], "'#a' cannot be"),
        (["add", "a" * 65], "cannot be"),
        (["remove", "bob"], "'bob' has no key in"),
        (["remove", "#"], "'#' has no key in"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
):
    path = tmp_path / "keys"
    run(path, "add", "alice", capsys=capsys)
    before = path.read_text()
    with pytest.raises(SystemExit, match=rf"^wsserver key: [^\n]*{why}[^\n]*$"):
        run(path, *arguments, capsys=capsys)
    assert path.read_text() == before


@pytest.mark.parametrize("action", [["list"], ["remove", "alice"]])
def test_a_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], action: list[str]):
    with pytest.raises(SystemExit, match=r"wsserver key: --api-keys-file: .*keys: No such file"):
        run(tmp_path / "keys", *action, capsys=capsys)


def test_a_file_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"wsserver key: --api-keys-file: .*keys: No such file"):
        run(tmp_path / "no folder" / "keys", "add", "alice", capsys=capsys)


@pytest.mark.parametrize("arguments", [[], ["add"], ["list"], ["add", "alice"], ["ad", "alice"], ["list", "--api", "x"]])
def test_the_command_says_what_it_needs(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        key_command.run(arguments, {})
    assert "usage: wsserver key" in capsys.readouterr().err


async def test_the_command_is_there_and_two_at_once_lose_nothing(tmp_path: Path):
    path = tmp_path / "keys"

    async def add(name: str) -> str:
        async with process(tmp_path, *COMMAND, "key", "add", name, WSSERVER_API_KEYS_FILE=str(path)) as running:
            out, _ = await running.process.communicate()
            assert await running.process.wait() == 0
            return out.decode().strip()

    alice, bob = await asyncio.gather(add("alice"), add("bob"))
    assert keys_file.read(path) == {"alice": digest(alice), "bob": digest(bob)}


# The disk is full: writes stop at a size, as `ulimit -f` sets it.
FULL = """
import resource, signal, sys
from wsserver import key_command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
key_command.run(sys.argv[2:], {})
"""


@pytest.mark.parametrize(
    ("action", "room"), [(["add", "bob"], -100), (["add", "bob"], 0), (["add", "bob"], 20), (["remove", "alice"], -100)]
)
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, action: list[str], room: int):
    path = tmp_path / "keys"
    keys_file.add(path, "alice")
    keys_file.add(path, "carol")
    before = path.read_bytes()
    asked = [*action, "--api-keys-file", str(path)]
    limit = str(len(before) + room)
    ended = subprocess.run([sys.executable, "-c", FULL, limit, *asked], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"wsserver key: --api-keys-file: [^\n]+: File too large\n", ended.stderr)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "nothing half is left either"


def test_what_is_written_is_on_the_disk_before_it_takes_the_place_of_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, steps = tmp_path / "keys", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def note_replace(old: str, new: Path) -> None:
        steps.append("replace")
        replace(old, new)

    monkeypatch.setattr("wsserver.keys_file.os.fsync", note_fsync)
    monkeypatch.setattr("wsserver.keys_file.os.replace", note_replace)
    keys_file.add(path, "alice")
    assert steps == ["file", "replace", "folder"]


def test_a_key_that_is_added_leaves_the_owner_and_the_mode(tmp_path: Path):
    path = tmp_path / "keys"
    keys_file.add(path, "alice")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    before = path.stat()
    keys_file.add(path, "bob")
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_many_commands_at_once_lose_nothing(tmp_path: Path):
    path = tmp_path / "keys"
    keys_file.add(path, "first")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: keys_file.add(path, f"n{number}"), range(32)))
        list(pool.map(lambda number: keys_file.remove(path, f"n{number}"), range(0, 32, 2)))
    assert keys_file.read(path).keys() == {"first", *(f"n{number}" for number in range(1, 32, 2))}


# Wrong keys.


def test_an_address_with_too_many_wrong_keys_waits_for_a_minute():
    failures = Failures(limit=3)
    for now in (0.0, 10.0):
        failures.add("192.0.2.1", now)
        assert failures.wait("192.0.2.1", now) == 0.0
    failures.add("192.0.2.1", 59.0)
    assert failures.wait("192.0.2.1", 59.0) == WINDOW
    assert failures.wait("192.0.2.2", 59.0) == 0.0
    assert failures.wait("192.0.2.1", 59.0 + WINDOW - 0.5) == 0.5
    assert failures.wait("192.0.2.1", 59.0 + WINDOW) == 0.0
    failures.add("192.0.2.1", 59.0 + WINDOW)
    assert failures.wait("192.0.2.1", 59.0 + WINDOW) == 0.0, "it begins anew"


def test_wrong_keys_with_a_minute_between_them_are_forgiven():
    failures = Failures(limit=2)
    for nth in range(10):
        failures.add("192.0.2.1", nth * WINDOW)
        assert failures.wait("192.0.2.1", nth * WINDOW) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("somebody", "somebody", True),
    ],
)
def test_addresses_of_one_owner_count_together(one: str, other: str, same: bool):
    failures = Failures(limit=1)
    failures.add(one, 0.0)
    assert (failures.wait(other, 0.0) > 0) == same


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=60))
def test_no_address_is_refused_for_another_or_for_less_than_the_limit(tries: list[tuple[str, int]]):
    failures, now, limit = Failures(limit=3), 0, 3
    at: dict[str, list[int]] = {name: [] for name in "abc"}
    for name, pause in tries:
        now += pause
        failures.add(name, now)
        at[name].append(now)
        for each, times in at.items():
            recent = [time for time in times if time > now - 2 * WINDOW]
            if failures.wait(each, now):
                assert len(recent) >= limit
            assert failures.wait(each, now) <= WINDOW
            assert failures.wait(each, now + WINDOW) == 0


def test_only_so_many_addresses_are_remembered_and_the_silent_ones_go_first():
    failures = Failures(limit=1)
    failures.add("first", 0.0)
    for nth in range(MAX_REMEMBERED - 1):
        failures.add(f"a{nth}", 0.0)
    failures.add("first", 0.0)
    for nth in range(10):
        failures.add(f"b{nth}", 0.0)
    assert len(failures) == MAX_REMEMBERED
    assert failures.wait("first", 0.0) > 0
    assert failures.wait("a9", 0.0) == 0
    assert failures.wait("a10", 0.0) > 0
