"""A file that is read by offset, and has to stay as it is meanwhile. Knows no format.

Plain reads: a mapping dies with SIGBUS when the file is cut, and changes with it when it is written to.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from LLM.errors import Refused


@dataclass(frozen=True, slots=True)
class Version:
    """Which content a file had, as far as its status tells."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Version":
        """Return the version that a status tells of."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class SteadyFile:
    """An open file of a known version; several threads may read it."""

    def __init__(self, path: Path, version: Version | None = None) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise (changed(path) if version else error) from error
        self.version = Version.of(os.fstat(self._descriptor))
        if version and self.version != version:
            self.close()
            raise changed(path)

    def __enter__(self) -> "SteadyFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes from `offset` on.

        Raises:
            Refused: `load_failed`, since the file got shorter.
        """
        content = bytearray(size)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on; raises as `read` does."""
        while target:
            count = os.preadv(self._descriptor, [target], offset)
            if not count:
                raise changed(self.path)
            target, offset = target[count:], offset + count


def check_unchanged(versions: Iterable[tuple[Path, Version]]) -> None:
    """Check that files are those that were read.

    Raises:
        Refused: `load_failed`, naming the one that changed or was replaced.
    """
    for path, version in versions:
        try:
            now = Version.of(path.stat())
        except OSError as error:
            raise changed(path) from error
        if now != version:
            raise changed(path)


def changed(path: Path) -> Refused:
    """Return the refusal of a file that is no longer what it was."""
    return Refused("load_failed", f"the model's {shown(path.name)} changed while it was being loaded; try again")


def shown(text: str, most: int = 60) -> str:
    """Return a text of a folder's as a client may see it: printable and short."""
    escaped = text[:most].encode("unicode_escape").decode()
    return escaped if len(text) <= most else escaped + "..."
