"""Chat templates in their process: they write what transformers writes, and can take neither time nor memory from others."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from LLM._base_model_handler import ChatMessage
from LLM.chat.reading import Reading, Unwanted, within
from LLM.chat.template import ChatTemplate
from LLM.chat.template_process import POOL, TemplateProcess
from LLM.errors import Refused
from tests import makers
from tests.conftest import eventually

SYSTEM, USER, ANSWER = (
    ChatMessage(role="system", content=" Be <brief>. "),
    ChatMessage(role="user", content="Žluťoučký 😀 {{ 7 * 7 }}\n"),
    ChatMessage(role="assistant", content="<think>\nhm\n</think>\n\nWell,  "),
)
CONVERSATIONS = {
    "one": [USER],
    "with a system": [SYSTEM, USER],
    "several turns": [USER, ANSWER, USER],
    "goes on": [USER, ANSWER],
    "goes on with nothing": [USER, ChatMessage(role="assistant", content="")],
    "out of order": [ANSWER, USER, USER],
    "system last": [USER, SYSTEM],
}
# What templates use beside loops and conditions.
FEATURES = {
    "generation": "{% for m in messages %}{% generation %}\n {% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}"
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages[0] | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true) }}",
    "now": "{{ strftime_now('%Y') }}{{ messages[-1].content }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=messages[0].role).a }}{{ dict.fromkeys(['a', 'b'], 1) }}",
    "special tokens": "{{ bos_token }}{{ eos_token is defined }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ messages[0].content }}",
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n{{- messages[-1]['content'] | trim }}\n",
    "refusal": "{{ raise_exception('the conversation must begin otherwise') }}",
    "undefined": "{{ messages[9].content.no }}",
    "syntax": "{% for %}{{ content }}",
    "sandbox": "{{ messages.append(1) }}",
    "macro": "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
}


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    return makers.byte_tokenizer(["<s>", "</s>"], [], template)


def own(tokenizer: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map, 60.0)


def theirs(tokenizer: Any, messages: list[ChatMessage]) -> str:
    """Give what transformers writes, or of a refusal what a client is told of it."""
    goes_on = messages[-1]["role"] == "assistant"
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    except TemplateError as error:
        return f"the model's chat template refuses this conversation: {error}"
    except ValueError:
        return "the model's chat template changes the last message, which is to be continued; end with a user's"
    return text


def ours(tokenizer: Any, messages: list[ChatMessage]) -> str:
    try:
        return own(tokenizer)(messages)
    except Refused as refused:
        told = (refused.reason, refused.field)
        return refused.message if told == ("bad_message", "messages") else repr(told)


@pytest.fixture(scope="module")
def families(default_model_folder: Path) -> dict[str, Any]:
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    gemma = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return {
        "default": AutoTokenizer.from_pretrained(default_model_folder, local_files_only=True),
        "qwen": makers.byte_tokenizer(qwen, ["<think>", "</think>"], makers.QWEN_TEMPLATE),
        "gemma": makers.byte_tokenizer(gemma, [], makers.GEMMA_TEMPLATE),
        "mistral": byte_tokenizer(makers.MISTRAL_TEMPLATE),
        "llama": byte_tokenizer(makers.LLAMA_TEMPLATE),
    }


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("family", ["default", "qwen", "gemma", "mistral", "llama"])
def test_a_familys_template_writes_what_transformers_writes(
    families: dict[str, Any], family: str, messages: list[ChatMessage]
):
    assert ours(families[family], messages) == theirs(families[family], messages)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", FEATURES.values(), ids=FEATURES)
def test_what_templates_use_does_what_it_does_in_transformers(template: str, messages: list[ChatMessage]):
    tokenizer = byte_tokenizer(template)
    assert ours(tokenizer, messages) == theirs(tokenizer, messages)


NESTED = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
HOSTILE = {
    "{{ 9**(9**9) }}": "took longer than 0.5 s",
    NESTED: "took longer than 0.5 s",
    "{{ 'a' * 1500000000 }}": "needs more memory",
    "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}": "needs more memory",
    "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}": "writes more than it may",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "calls itself too often",
    "{{ 1 // 0 }}": "ZeroDivisionError",
}


@pytest.mark.parametrize(("source", "why"), HOSTILE.items())
def test_a_hostile_template_is_refused_by_name_and_the_next_one_is_served(source: str, why: str):
    hostile = ChatTemplate(source, {}, 0.5 if "longer" in why else 60.0)
    with pytest.raises(Refused, match=why) as refused:
        hostile([USER])
    assert (refused.value.reason, refused.value.field) == ("unsupported", "messages")
    assert "send prompt instead" in refused.value.message
    assert ChatTemplate("{{ messages[0].content }}", {}, 60.0)([USER]) == USER["content"]


def test_a_template_that_fails_the_probe_is_not_tried_again():
    hostile = ChatTemplate(NESTED, {}, 0.5)
    problem = hostile.probe()
    assert problem
    assert "took longer" in problem
    hostile._source = "{{ messages[0].content }}"  # so that a second try would be served
    with pytest.raises(Refused, match="took longer") as refused:
        hostile([USER])
    assert refused.value.message == problem


def test_a_template_that_only_refuses_the_probe_stays_usable():
    strict = ChatTemplate("{{ raise_exception('no') if messages | length < 2 else 'yes' }}", {}, 60.0)
    assert strict.probe() is None
    assert strict([SYSTEM, USER]) == "yes"


async def test_what_nobody_waits_for_any_more_is_killed(monkeypatch: pytest.MonkeyPatch):
    made = processes(monkeypatch)
    bounds, ended = Reading(1000, "messages"), threading.Event()

    def render() -> None:
        try:
            with within(bounds):
                ChatTemplate(NESTED, {}, 600.0)([USER])
        except Unwanted:
            ended.set()

    POOL._idle.clear()
    thread = threading.Thread(target=render)
    thread.start()
    await eventually(lambda: bool(made))
    bounds.wanted = False
    await eventually(ended.is_set)
    thread.join()
    assert not made[0].alive


def processes(monkeypatch: pytest.MonkeyPatch) -> list[TemplateProcess]:
    made: list[TemplateProcess] = []

    class Noted(TemplateProcess):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr("LLM.chat.template_process.TemplateProcess", Noted)
    return made


def test_a_process_that_died_while_it_was_idle_is_replaced():
    simple = ChatTemplate("{{ messages[0].content }}", {}, 60.0)
    assert simple([USER]) == USER["content"]
    idle = POOL._idle[-1]
    os.kill(idle.pid, signal.SIGKILL)
    os.waitid(os.P_PID, idle.pid, os.WEXITED | os.WNOWAIT)
    assert simple([USER]) == USER["content"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_the_process_has_nothing_of_the_servers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WSSERVER_SECRET", "x")
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        process = TemplateProcess()
        process.ask({"template": "", "values": {}}, 60.0, lambda: None)
    there = Path("/proc") / str(process.pid)
    assert {fd.name for fd in (there / "fd").iterdir()} == {"0", "1", "2"}
    assert "WSSERVER_SECRET" not in (there / "environ").read_text()
    assert os.getsid(process.pid) == process.pid, "a terminal's Ctrl-C would reach it"
    process.kill()


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "endless"])
def test_the_process_dies_with_a_server_that_is_killed(source: str):
    start = (
        "import sys, time\n"
        "from LLM.chat.template_process import TemplateProcess\n"
        "process = TemplateProcess()\n"
        "process.ask({'template': '', 'values': {}}, 60.0, lambda: None)\n"
        "print(process.pid, flush=True)\n"
        "say = lambda: print(flush=True)\n"
        f"if {source == 'endless'}: process.ask({{'template': {NESTED!r}, 'values': {{}}}}, 600.0, say)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as server:
        assert server.stdout
        pid = int(server.stdout.readline())
        if source == "endless":
            server.stdout.readline()  # it renders
        child = os.pidfd_open(pid)
        server.kill()
    asyncio.run(gone(child))
    os.close(child)


async def gone(pidfd: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    await ended.wait()
