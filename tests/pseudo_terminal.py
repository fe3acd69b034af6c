"""A terminal for a command that is run in it: what it shows, and what is typed."""

import asyncio
import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

from tests.conftest import eventually

ROOT = Path(__file__).parent.parent
CTRL_C, CTRL_D = "\x03", "\x04"
WHERE, THERE = "\x1b[6n", "\x1b[1;1R"  # a terminal is asked where its cursor is, and answers as if that was typed
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "TERM": "xterm"}  # the packages of this checkout


class PseudoTerminal:
    """Its screen as a stream of characters, and the process that runs in it."""

    def __init__(self, master: int) -> None:
        self.process: asyncio.subprocess.Process
        self.shown = ""
        self._master = master
        self._seen = 0

    def type(self, text: str) -> None:
        """Type, as a user does."""
        os.write(self._master, text.encode())

    async def shows(self, text: str) -> None:
        """Wait until it has shown a text since the last one that was waited for."""
        await eventually(lambda: self.shown.find(text, self._seen) >= 0, 30)
        self._seen = self.shown.index(text, self._seen) + len(text)

    async def ends(self) -> int:
        """Wait until its process has ended; give the exit status."""
        async with asyncio.timeout(30):
            return await self.process.wait()

    def read(self) -> None:
        """Take what has been written."""
        try:
            shown = os.read(self._master, 4096).decode(errors="replace")
        except OSError:  # nobody has it open any more
            asyncio.get_running_loop().remove_reader(self._master)
            return
        self.shown += shown
        self.type(THERE * shown.count(WHERE))


@contextlib.asynccontextmanager
async def in_terminal(*arguments: str, stderr_only: bool = False, **environment: str) -> AsyncIterator[PseudoTerminal]:
    """Run a command of wsserver in a terminal, as a session leader; `stderr_only` leaves it pipes for the rest."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    other = asyncio.subprocess.PIPE if stderr_only else slave
    terminal = PseudoTerminal(master)
    asyncio.get_running_loop().add_reader(master, terminal.read)
    terminal.process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "wsserver", *arguments),
        stdin=other,
        stdout=other,
        stderr=slave,
        env=os.environ | ENVIRONMENT | environment,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    try:
        yield terminal
    finally:
        if terminal.process.returncode is None:
            terminal.process.kill()
        await terminal.process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)


def _take_terminal() -> None:
    """Let Ctrl-C come to this process: it becomes the leader of a session, whose terminal this is."""
    os.setsid()
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)
