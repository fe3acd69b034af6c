"""`python -m tests.autobahn WSTEST`: the testsuite's fuzzing client against our echo path and the bare library's server.

Fails if a case goes wrong with ours and not with the bare library. The reports, byte by byte, stay in build/autobahn/.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.autobahn.reports import failures, summary, worse

ROOT = Path(__file__).parent.parent.parent
OURS, BARE = "wsserver", "websockets"
FOLDER = ROOT / "build" / "autobahn" / "reports"
EXCLUDED = [
    "9.*",  # messages of up to 16 MiB: ours takes 256 KiB
    "12.*",  # compression, which ours does not offer: it costs every idle connection 32 KiB, and frames are short
    "13.*",  # the same, with parameters
]
WSSERVER = ("wsserver", "--model", "wsserver/echo", "--port", "0", "--echo-path", "on", "--log-level", "warning")
# Hundreds of connections in a few seconds, and in some of them more frames than a client sends.
MAY = ("--handshakes-per-second", "1000", "--messages-per-second", "10000")


@contextlib.contextmanager
def serving(module: str, *options: str) -> Iterator[str]:
    """Run a module that serves; give the URL it prints."""
    command = [sys.executable, "-m", module, *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            found = re.search(r"ws://\S+", process.stdout.readline())
            if found is None:
                sys.exit(f"{module} did not start")
            yield found[0]
        finally:
            process.terminate()
            process.communicate()


def fuzz(wstest: str, urls: dict[str, str]) -> None:
    """Run every case against every server."""
    servers = [{"agent": agent, "url": url} for agent, url in urls.items()]
    spec = {"outdir": str(FOLDER), "servers": servers, "cases": ["*"], "exclude-cases": EXCLUDED, "exclude-agent-cases": {}}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "spec.json").write_text(json.dumps(spec))
    command = [wstest, "--mode", "fuzzingclient", "--spec", str(FOLDER / "spec.json")]
    with (FOLDER / "wstest.log").open("w") as log:
        subprocess.run(command, cwd=FOLDER, stdout=log, stderr=log, check=True)


def main(wstest: str) -> int:
    (FOLDER / "index.json").unlink(missing_ok=True)
    with serving(*WSSERVER, *MAY) as ours, serving("tests.autobahn.bare_echo") as bare:
        fuzz(str(Path(wstest).absolute()), {OURS: ours.replace("/ws", "/echo"), BARE: bare})
    reports = json.loads((FOLDER / "index.json").read_text())
    for agent in (OURS, BARE):
        lines = [summary(reports[agent]), *failures(reports[agent])]
        print(f"{agent}: " + "; ".join(lines))
    found = worse(reports[OURS], reports[BARE])
    verdict = (
        "worse than the bare library: " + "; ".join(found) if found else "no failure that the bare library does not have"
    )
    print(verdict)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
