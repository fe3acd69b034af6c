"""The lexer of the page's Markdown: work that grows with a text's length and not with its square. In Node, by counting."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.web.node import NEEDS_NODE, NODE, WEB

pytestmark = NEEDS_NODE

# Every pattern of the lexer's runs through `exec`, over all that is left of the text: their sum is the work.
COUNTING = """
import { readFileSync } from "node:fs";
import { lexer } from "./vendor/marked/marked.js";
import { parsed } from "./bounded_lexer.js";
const plain = (source) => lexer(source, { gfm: true, breaks: true });
const exec = RegExp.prototype.exec;
function work(read, source) {
  let work = 0;
  RegExp.prototype.exec = function (text) {
    work += text.length - (this.global || this.sticky ? this.lastIndex : 0);
    return exec.call(this, text);
  };
  try {
    read(source);
  } finally {
    RegExp.prototype.exec = exec;
  }
  return work;
}
const shown = (tokens) => tokens.map(({ raw }) => raw).join("");
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const input = JSON.parse(readFileSync(0, "utf8"));
const filled = (unit, length) => unit.repeat(Math.ceil(length / unit.length)).slice(0, length);
"""

HOSTILE = (
    *("*_*_a", "*a_", "![*a", "*", "_", "**a ", "***a", "a***", "a**b", "*a**", "*a*", "~~a ", "a_", "**_"),
    *("[", "![", "[a](", "[a](<", "[a][", "[\\", "[[]", "*[a", '[a](b "', "[a]: b\n", "[a]"),
    *("`a", "``a`", "*`a", "<", "<a ", '<a b="', "a<?", "a<![CDATA[", "<a@", "*<a"),
    *("|", "|a|\n|-|\n", "|a|b|\n", "a|b\n", ">", "> a\n", "> a\nb\n", "- a\n", "- ", "1. ", "> - ", "-\n", "- a\n\n"),
    *("a  \n", "\n", " \n", "# a\n", "a\n-", "```\n", "~~~a\n", "\\*", "&a;", "www.", "http://a", "a@", "a@a.", "a. "),
)
ORDINARY = """# A heading

Some *words* and **more** of them, `code`, [a link](https://example.com) and ~~nothing~~.
A line of its own.

1. one
2. two
   - sub

| a | b |
|---|---|
| 1 | *2* |

> quoted

"""


def run(folder: Path, script: str, value: Any) -> Any:
    """Run a script beside the page's own files; give what it says of a value."""
    shutil.copytree(WEB / "vendor", folder / "vendor")
    shutil.copyfile(WEB / "bounded_lexer.js", folder / "bounded_lexer.js")
    (folder / "package.json").write_text('{"type":"module"}')
    (folder / "script.js").write_text(COUNTING + script)
    asked = json.dumps(value)
    command = [NODE, str(folder / "script.js")]
    return json.loads(subprocess.run(command, input=asked, check=True, capture_output=True, text=True, timeout=120).stdout)


def test_twice_the_text_is_about_twice_the_work_whatever_it_is(tmp_path: Path):
    script = """
    console.log(JSON.stringify(Object.fromEntries(input.map((unit) => {
      const [half, whole] = [16_384, 32_768].map((length) => work(parsed, filled(unit, length)));
      return [unit, whole / half];
    }))));
    """
    growth = run(tmp_path, script, HOSTILE)
    assert {unit: factor for unit, factor in growth.items() if factor > 3.1} == {}


def test_what_froze_the_page_is_a_small_part_of_the_work_it_was(tmp_path: Path):
    script = """
    console.log(JSON.stringify(input.map((unit) => {
      const source = filled(unit, 12_000);
      return [work(plain, source) / work(parsed, source), shown(parsed(source)) === source];
    })));
    """
    for factor, whole in run(tmp_path, script, ["*_*_a", "*a_", "![*a"]):
        assert factor > 8
        assert whole, "nothing of it is left out"


@pytest.mark.parametrize("times", [1, 60], ids=["short", "longer than is read at once"])
def test_an_ordinary_text_is_read_as_the_library_reads_it(tmp_path: Path, times: int):
    script = "console.log(JSON.stringify(same(parsed(input), plain(input))));"
    code = "```python\n" + "print('*_*_a')\n" * 20 * times + "```\n\n"
    assert run(tmp_path, script, (ORDINARY + code) * times)


def test_no_character_is_cut_and_none_is_lost(tmp_path: Path):
    script = """
    const texts = (tokens) => tokens.flatMap(({ tokens: inner, text }) => (inner ? texts(inner) : [text]));
    console.log(JSON.stringify(input.map((source) => {
      const tokens = parsed(source);
      const read = texts(tokens);
      return [shown(tokens) === source, read.join("") === source, read.every((text) => text.isWellFormed())];
    })));
    """
    script = script.replace(".isWellFormed()", ".match(/^[\\ud800-\\udbff]?.*[^\\ud800-\\udbff]$/su)")
    sources = ["🐎" * 30_000, "a" + "🐎" * 30_000, "a" * 50_000, "some words " * 3000 + "end"]
    assert run(tmp_path, script, sources) == [[True, True, True]] * 4
