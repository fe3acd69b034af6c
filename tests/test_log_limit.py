"""Lines of the log: a client can write no more of them than a few a second, whatever it does."""

import asyncio
import io
import logging
import sys

import pytest

from tests.test_main import COMMAND, ON_ECHO, process
from wsserver.log_limit import BURST, LimitedHandler


class Written:
    """A logger with a limited handler, the lines it wrote and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.handler = LimitedHandler(lambda: self.now)
        self.handler.setStream(self.stream)
        self.log = logging.Logger("test", logging.DEBUG)
        self.log.addHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def refuse(self, count: int) -> None:
        for number in range(count):
            self.log.warning("refused %d", number)


def test_some_lines_of_a_kind_come_at_once_and_then_one_a_second_with_a_count() -> None:
    written = Written()
    written.refuse(1000)
    assert written.lines == [f"refused {number}" for number in range(int(BURST))]
    written.now += 1
    written.refuse(1000)
    assert written.lines[int(BURST) :] == ["refused 0 (and 980 more lines like this one)"]
    written.now += 2
    written.refuse(1)
    assert written.lines[-1] == "refused 0 (and 999 more lines like this one)"
    written.refuse(1)
    assert written.lines[-1] == "refused 0", "nothing was left out since"


def test_what_a_client_writes_makes_no_kind_of_its_own_and_hides_no_other() -> None:
    written = Written()
    for number in range(1000):
        written.log.warning(f"a text that is made before: {number}")
    written.log.error("something else")
    assert len(written.lines) == BURST + 1
    assert written.lines[-1] == "something else"


def test_tracebacks_are_lines_too_and_debug_is_told_whole() -> None:
    written = Written()
    for _ in range(100):
        try:
            raise ValueError("% as it is")
        except ValueError:
            written.log.exception("failed %s", "here")
    assert len([line for line in written.lines if line.startswith("ValueError")]) == BURST
    written.now += 5
    written.log.debug("not counted")
    for _ in range(100):
        written.log.debug("not counted")
    assert written.lines[-101:] == ["not counted"] * 101


def test_other_handlers_get_every_line_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    written = Written()
    written.log.addHandler(caplog.handler)
    written.refuse(100)
    written.now += 1
    written.refuse(1)
    assert caplog.messages == [*(f"refused {number}" for number in range(100)), "refused 0"]


async def test_a_client_that_is_refused_a_thousand_times_writes_a_few_lines(tmp_path) -> None:
    options = ["--handshakes-per-second", "1000"]
    async with process(tmp_path, *COMMAND, *ON_ECHO, *options) as running:
        port = int((await running.says()).rpartition(":")[2].partition("/")[0])
        for _ in range(300):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
            assert b"403" in await reader.readline()
            writer.close()
        assert 1 <= running.stderr.count("refused, Host") < 100, sys.version
