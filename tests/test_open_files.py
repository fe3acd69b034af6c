import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_main import COMMAND, ON_ECHO, process
from wsserver import open_files
from wsserver.config import Config
from wsserver.open_files import SPARE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def soft() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def may_open(pid: int) -> int:
    limits = Path(f"/proc/{pid}/limits").read_text()
    return int(limits.split("Max open files")[1].split()[0])


@pytest.mark.parametrize(("soft_before", "connections", "soft_after"), [(300, 100, 100 + SPARE), (900, 100, 900)])
def test_as_many_as_are_needed_are_allowed_and_never_fewer_than_before(
    soft_before: int, connections: int, soft_after: int
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft_before, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert open_files.allow(connections) == connections
    assert soft() == soft_after


@pytest.mark.parametrize(("hard", "told"), [(3000, False), (500, True)])
async def test_a_server_takes_what_it_may_and_says_if_that_is_not_enough(tmp_path: Path, hard: int, told: bool) -> None:
    limited = f'ulimit -Sn 100; ulimit -Hn {hard}; exec "$@"'
    async with process(tmp_path, "sh", "-c", limited, "sh", *COMMAND, *ON_ECHO) as server:
        assert "serving" in await server.says()
        assert may_open(server.process.pid) == min(Config().max_connections + SPARE, hard)
        assert (f"--max-connections: the system lets this process have {hard - SPARE} connections" in server.stderr) is told
