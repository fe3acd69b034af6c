"""Model folders as they were read last: one that did not change is not read again, also if it was refused.

Knows neither torch nor transformers.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock

from LLM import model_folder
from LLM.errors import Refused
from LLM.model_folder import ModelFolder

# Folders that are remembered, the ones used last.
REMEMBERED = 64

# Names, sizes and times of a folder's files.
_Stamp = tuple[tuple[str, int, int], ...]
# What a read came to: the folder, or the arguments of its refusal.
_Result = ModelFolder | tuple[str, str | None]


class FolderCache:
    """What was read of folders. Used by several threads; a read that hangs holds up no other one."""

    def __init__(self, read: Callable[[Path], ModelFolder] = model_folder.read) -> None:
        self._read = read
        self._lock = Lock()
        self._known: OrderedDict[Path, tuple[_Stamp, _Result]] = OrderedDict()

    def read(self, folder: Path) -> ModelFolder:
        """Give what is known of a folder, without what its GGUF file says beside that.

        Raises:
            Refused: `load_failed`, as when it was read.
        """
        stamp = _stamp(folder)  # before the read: what changes meanwhile is read again
        with self._lock:
            known = self._known.get(folder)
            if known:
                self._known.move_to_end(folder)
        result = known[1] if known and known[0] == stamp else self._read_now(folder, stamp)
        if isinstance(result, ModelFolder):
            return result
        raise Refused("load_failed", *result)

    def _read_now(self, folder: Path, stamp: _Stamp) -> _Result:
        try:
            # The metadata of a GGUF file are large, and a plan needs none of them.
            result: _Result = replace(self._read(folder), gguf=None)
        except Refused as refused:
            self._remember(folder, stamp, (refused.message, refused.field))
            raise
        self._remember(folder, stamp, result)
        return result

    def _remember(self, folder: Path, stamp: _Stamp, result: _Result) -> None:
        with self._lock:
            self._known[folder] = stamp, result
            self._known.move_to_end(folder)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)


def _stamp(folder: Path) -> _Stamp:
    try:
        return tuple((file.name, *_size_and_time(file)) for file in sorted(folder.iterdir()))
    except OSError as error:
        why = "the model's folder cannot be loaded: it is gone, or cannot be read; copy it anew"
        raise Refused("load_failed", why) from error


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except FileNotFoundError:  # a link to nothing harms only a load that needs it
        return -1, 0
    return stat.st_size, stat.st_mtime_ns
