"""The file of keys: an owner's name and the hash of a key on each line. Holds no key that would open anything."""

import os
import re
import tempfile
from pathlib import Path

from wsserver.auth import digest, new_key
from wsserver.config import BadSetting

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
    """Make a key, write its hash into the file, and give it: nobody can find it out again.

    Raises:
        BadSetting: the name cannot be, or is taken, or the file cannot be used.
    """
    if not NAME.fullmatch(name) or name == DEFAULT:
        raise BadSetting(f"{name!a} cannot be a key's name; use up to 64 letters, digits, '.', '_' and '-', not {DEFAULT!r}")
    text = _text(path) if path.exists() else ""
    if name in parse(text, path):
        raise BadSetting(f"{name} has a key in {path} already; remove that one first, or choose another name")
    key = new_key()
    before = FIRST_LINE if not text else "" if text.endswith("\n") else "\n"
    try:
        # In one write, so that two at once lose nothing. Whoever can write into the file can let himself in.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(before + line(name, digest(key)))
    except OSError as error:
        raise _unusable(path, error) from None
    return key


def remove(path: Path, name: str) -> None:
    """Take a key's hash out of the file.

    Raises:
        BadSetting: it is not there, or the file cannot be used.
    """
    text = _text(path)
    if name not in parse(text, path):
        raise BadSetting(f"{name!a} has no key in {path}")
    kept = [line for line in text.split("\n") if line.split()[:1] != [name]]
    try:
        _rewrite(path.resolve(), "\n".join(kept))
    except OSError as error:
        raise _unusable(path, error) from None


def _rewrite(path: Path, text: str) -> None:
    """Put another file in the place of one, whole or not at all, with the same owner and mode."""
    about = path.stat()
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(number, "w") as file:
            file.write(text)
            os.fchmod(number, about.st_mode)
            os.fchown(number, about.st_uid, about.st_gid)
        os.replace(temporary, path)
    except OSError:
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
