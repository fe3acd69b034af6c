"""README.md's section of that name, done as it says: its commands, its drop-in, its message, over a real socket."""

import json
import re
import shlex
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from LLM import model_table
from LLM.listing import drop_in_name
from tests import makers
from tests.conftest import Client
from tests.test_docs import README
from tests.test_main import ROOT, process

SECTION = README[README.index("## Adding a model") : README.index("\n## ", README.index("## Adding a model") + 1)]
COMMANDS = [
    shlex.split(line) for block in re.findall(r"^```sh\n(.*?)^```", SECTION, re.S | re.M) for line in block.splitlines()
]
LISTS, SERVES = [command[1:] for command in COMMANDS if command[0] == ".venv/bin/wsserver"]
[MESSAGE] = [json.loads(command[1]) for command in COMMANDS if command[0] == "echo"]
[DROP_IN] = re.findall(r"^```python\n(.*?)^```", SECTION, re.S | re.M)
NAME = "acme/Tiny-Poet"
SETTINGS = {"WSSERVER_PORT": "0", "WSSERVER_DEVICE": "cpu", "WSSERVER_DTYPE": "float32", "WSSERVER_KV_MEMORY": "16MiB"}


HEADINGS = astuple(model_table.HEADINGS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the model that was downloaded, and the models' folder made as the section says."""
    makers.tiny_folder(tmp_path / "Tiny-Poet")
    make, copy = [command for command in COMMANDS if command[0] in ("mkdir", "cp")]
    assert make == ["mkdir", "-p", "models/acme"]
    assert copy == ["cp", "-r", "Tiny-Poet", f"models/{NAME}"]
    (tmp_path / "models" / "acme").mkdir(parents=True)
    (tmp_path / "Tiny-Poet").rename(tmp_path / "models" / NAME)
    return tmp_path


def run(folder: Path, arguments: list[str]) -> Any:
    return process(folder, sys.executable, "-m", "wsserver", *arguments, cwd=folder, PYTHONPATH=str(ROOT), **SETTINGS)


async def chat(client: Client, id: str, **changes: Any) -> dict[str, Any]:
    fields = {name: value for name, value in MESSAGE.items() if name != "type"}
    return await client.generate(**{**fields, "id": id, "ignore_eos": True, **changes})


async def test_the_model_is_listed(folder: Path):
    async with run(folder, LISTS) as running:
        printed, _ = await running.process.communicate()
    [row] = [line.split() for line in printed.decode().splitlines() if line.startswith(NAME)]
    assert (row[2], row[5], row[-1]) == ("llama", "float32", "yes")
    assert tuple(printed.decode().split()[: len(HEADINGS)]) == HEADINGS


async def test_without_its_drop_in_the_example_is_refused(folder: Path):
    async with run(folder, SERVES) as running:
        await running.says()
        async with running.client() as client:
            done = await chat(client, "g")
            assert done["error"]["code"] == "bad_message"
            assert "there is no system turn" in done["error"]["message"]


async def test_its_drop_in_does_what_the_section_says(folder: Path):
    assert f"`models/{drop_in_name(NAME)}.py`" in SECTION
    (folder / "models" / f"{drop_in_name(NAME)}.py").write_text(DROP_IN)
    async with run(folder, SERVES) as running:
        assert await running.says() == f"serving {NAME} (float32 on cpu) at {running.url}"
        async with running.client() as client:
            done = await chat(client, "g", temperature=0)
            merged = [{"role": "user", "content": "Rhyme.\n\nHow is the rain?"}]
            tokenizer = AutoTokenizer.from_pretrained(folder / "models" / NAME, local_files_only=True)
            ids = tokenizer.apply_chat_template(merged, add_generation_prompt=True, return_dict=False)
            assert done["usage"]["prompt_tokens"] == len(ids)
            assert done["joined"] == (await chat(client, "merged", messages=merged, temperature=0))["joined"]
            # Its sampling is what counts where a request says nothing of it.
            texts = [
                (await chat(client, f"s{number}", seed=7, **sampling))["joined"]
                for number, sampling in enumerate([{}, {"temperature": 0.7, "top_p": 0.95}, {"temperature": 3.0}])
            ]
            assert texts[0] == texts[1] != texts[2]


def test_the_section_shows_the_tables_headings():
    assert re.search(r"\s+".join(HEADINGS), SECTION)
