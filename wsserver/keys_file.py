"""The file of keys: an owner's name and the hash of a key on each line. Holds no key that would open anything."""

import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsserver.auth import digest, new_key
from wsserver.config import BadSetting

if sys.platform != "win32":
    import fcntl

FIRST_LINE = '# Keys of wsserver: a name and the SHA-256 of its key on each line, made by "wsserver key add NAME".\n'
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern})[ \t]+sha256:([0-9a-f]{{64}})")
# The owner of the key that comes by the environment.
DEFAULT = "default"
SHORTEST = 16  # characters of a key that an operator has chosen; those that are made here have 46


def read_keys(path: str, own: str | None) -> dict[str, bytes]:
    """Give the hashes of a file's keys and of the one that the environment names, by their owners' names.

    Raises:
        BadSetting: there are none where some were promised, or they cannot be read.
    """
    digests = read(Path(path)) if path else {}
    if own is not None:
        if not re.fullmatch(rf"[!-~]{{{SHORTEST},}}", own):
            rule = f"a key has {SHORTEST} characters or more, of ASCII and without spaces"
            raise BadSetting(f"WSSERVER_API_KEY: {rule}; `openssl rand -hex 32` makes one")
        digests[DEFAULT] = digest(own)
    return digests


def read(path: Path) -> dict[str, bytes]:
    """Give the hashes in a file.

    Raises:
        BadSetting: it cannot be read, or is no such file.
    """
    return parse(_text(path), path)


def parse(text: str, path: Path) -> dict[str, bytes]:
    """Give the hashes in a file's text, by their owners' names. A line may be empty, or begin with # and be a comment.

    Raises:
        BadSetting: a line is something else, or one of two that say the same.
    """
    digests: dict[str, bytes] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not (stripped := line.strip()) or stripped.startswith("#"):
            continue
        found = LINE.fullmatch(stripped)
        # What is there is not repeated: it might be a key that was put there by mistake.
        if not found:
            raise BadSetting(f"--api-keys-file: {path}, line {number}: this is no name with a hash, like `alice sha256:...`")
        name, hashed = found[1], bytes.fromhex(found[2])
        if name == DEFAULT:
            raise BadSetting(f"--api-keys-file: {path}, line {number}: {DEFAULT} is the name of WSSERVER_API_KEY's key")
        if name in digests or hashed in digests.values():
            raise BadSetting(f"--api-keys-file: {path}, line {number}: this name, or this key, is there already")
        digests[name] = hashed
    return digests


def line(name: str, hashed: bytes) -> str:
    """Give a key's line of the file."""
    return f"{name} sha256:{hashed.hex()}\n"


def add(path: Path, name: str) -> str:
    """Make a key, write its hash into the file, and return it: it cannot be found out again.

    Raises:
        BadSetting: the name cannot be, or is taken, or the file cannot be used.
    """
    if not NAME.fullmatch(name) or name == DEFAULT:
        raise BadSetting(f"{name!a} cannot be a key's name; use up to 64 letters, digits, '.', '_' and '-', not {DEFAULT!r}")
    key = new_key()
    with _changing(path) as file:
        text = _text(file) if file.exists() else FIRST_LINE
        if name in parse(text, path):
            raise BadSetting(f"{name} has a key in {path} already; remove that one first, or choose another name")
        between = "" if text.endswith("\n") or not text else "\n"
        _rewrite(file, text + between + line(name, digest(key)))
    return key


def remove(path: Path, name: str) -> None:
    """Take a key's hash out of the file.

    Raises:
        BadSetting: it is not there, or the file cannot be used.
    """
    with _changing(path) as file:
        text = _text(file)
        if name not in parse(text, path):
            raise BadSetting(f"{name!a} has no key in {path}")
        kept = [line for line in text.split("\n") if line.split()[:1] != [name]]
        _rewrite(file, "\n".join(kept))


@contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """Give the file that a path means, links followed; two commands that change it take turns.

    Raises:
        BadSetting: the file cannot be used.
    """
    file = Path(os.path.realpath(path))
    try:
        with _locked(file.parent):
            yield file
    except OSError as error:
        raise _unusable(path, error) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, and write what changed in it to the disk. A file in it would be another one after each change."""
    if sys.platform == "win32":  # opens no folders
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
        os.fsync(number)  # or a power cut could bring the old file back
    finally:
        os.close(number)


def _rewrite(path: Path, text: str) -> None:
    """Put another file in the place of one, whole or not at all, with the same owner and mode."""
    about = path.stat() if path.exists() else None
    # mkstemp lets only its owner read and write: a writer could let himself in.
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            if about and sys.platform != "win32":
                os.fchmod(number, stat.S_IMODE(about.st_mode))
                os.fchown(number, about.st_uid, about.st_gid)
            file.flush()
            os.fsync(number)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: Exception) -> BadSetting:
    why = error.strerror if isinstance(error, OSError) else "it is no text"
    return BadSetting(f"--api-keys-file: {path}: {why}")
