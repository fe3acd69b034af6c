"""client.js and its types as files: their size, the words they know, and what a caller may write."""

import asyncio
import gzip
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest

from tests.web.node import NEEDS_NODE, WEB
from wsserver.protocol import Done, ErrorCode, FinishReason, Generate, Init, Limits, Ready

pytestmark = NEEDS_NODE

TSC = Path(__file__).parent / "node_modules" / ".bin" / "tsc"


def test_it_is_small() -> None:
    assert len(gzip.compress((WEB / "client.js").read_bytes(), mtime=0)) < 5 * 1024


def test_its_types_know_every_word_of_the_protocol() -> None:
    types = (WEB / "client.d.ts").read_text()
    codes = re.search(r"export type ErrorCode =(.*?)\n\n", types, re.DOTALL)
    reasons = re.search(r"finish_reason: (.*?);", types)
    assert codes
    assert reasons
    own = {"unreachable", "connection_lost", "detached", "closed"}
    assert set(re.findall(r'"(\w+)"', codes[1])) == {*get_args(ErrorCode), *own}
    assert set(re.findall(r'"(\w+)"', reasons[1])) == set(get_args(FinishReason))
    named = {name.rstrip("?") for name in re.findall(r"\b(\w+\??):", types)}
    for message in (Generate, Init, Ready, Limits, Done):
        assert named >= set(message.__struct_fields__) - {"token"}


async def test_its_types_are_what_a_caller_writes_and_nothing_else(tmp_path: Path) -> None:
    if not TSC.exists():
        pytest.skip("needs TypeScript: npm ci --prefix tests/web")
    shutil.copyfile(WEB / "client.d.ts", tmp_path / "client.d.ts")
    (tmp_path / "client.js").touch()
    shutil.copyfile(TSC.parents[2] / "types.ts", tmp_path / "types.ts")
    command = f"{TSC} --strict --noEmit --target esnext --module esnext --moduleResolution bundler types.ts"
    process = await asyncio.create_subprocess_exec(*command.split(), cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert (printed.decode(), process.returncode) == ("", 0)
