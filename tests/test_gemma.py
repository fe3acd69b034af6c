"""Gemma 3 270M out of its GGUF file, from a client's socket to its weights: it speaks, and llama.cpp writes the same ids."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import PreTrainedTokenizerFast

from LLM import gguf_file
from LLM._base_model_handler import ChatMessage, LoadedModel, LoadOptions, encode
from LLM.gguf_config import end_token_ids
from LLM.gguf_file import GgufFile
from LLM.gguf_tokenizer import tokenizer_of
from LLM.listing import MODELS_ROOT
from LLM.loader import _chat_template
from LLM.loading.steady_file import SteadyFile
from LLM.model_srv_google_gemma_3_270m_it import ModelHandler as InstructionTuned
from LLM.model_srv_wsserver_echo import EchoRunner
from LLM.placement import plan
from tests.conftest import Client, Running, running
from tests.makers import GEMMA_TEMPLATE

GEMMA = "google/gemma-3-270m"
END_OF_TURN = 106
# What llama.cpp makes of texts with this very file (llama-cpp-python 0.3.36, special=True).
IDS = {
    "The capital of France is": [2, 818, 5279, 529, 7001, 563],
    "a  b\n\nc   d": [2, 236746, 138, 236763, 108, 236755, 139, 236753],
    "emoji 😀👩\u200d👩\u200d👧 ok": [2, 67906, 163543, 243767, 237243, 243767, 237243, 244814, 7546],
    "<start_of_turn>user\nHi<end_of_turn>\n": [2, 105, 2364, 107, 10979, 106, 107],
    " leading": [2, 5830],
    "trailing ": [2, 136697, 236743],
    "\tTab\t\tx": [2, 255968, 7874, 255969, 236781],
    "žluťoučký kůň": [2, 237157, 6357, 208991, 237120, 75500, 620, 237872, 238759],
    "123 4567": [2, 236770, 236778, 236800, 236743, 236812, 236810, 236825, 236832],
    "": [2],
    "\n\n\n": [2, 109],
    "   ": [2, 139],
    "def f(x):\n    return x": [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123],
}
# The same, of the format that the instruction-tuned model was trained on.
MESSAGES: list[ChatMessage] = [
    {"role": "system", "content": "You know everything."},
    {"role": "user", "content": "What is the capital of France? 😀"},
]
CHAT_IDS = [
    *(2, 105, 2364, 107, 3048, 1281, 4326, 236761, 108, 3689, 563, 506, 5279, 529, 7001),
    *(236881, 163543, 106, 107, 105, 4368, 107),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = MODELS_ROOT / GEMMA
    if not folder.exists():
        pytest.skip("Gemma is missing; `make test` installs it, or python -m LLM.default_model google/gemma-3-270m")
    return folder


@pytest.fixture(scope="module")
def file(folder: Path) -> GgufFile:
    return gguf_file.read(SteadyFile(next(folder.glob("*.gguf"))))


@pytest.fixture(scope="module")
def tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    return tokenizer_of(file)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(folder: Path) -> AsyncIterator[Running]:
    async with running(model=GEMMA, dtype="float32", device="cpu", kv_memory=64 << 20) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Running) -> AsyncIterator[Client]:
    async with server.client() as client:
        yield client


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(300)
async def test_it_streams_what_it_knows(client: Client):
    await client.send(type="init", id="i")
    stages = [(await client.until("loading"))["stage"]]
    ready = await client.until("ready")
    assert (ready["model"]["id"], ready["model"]["dtype"]) == (GEMMA, "float32")
    stages += [frame["stage"] for frame in client.of("i", "loading")]
    assert set(stages) == {"config", "weights", "warmup"}
    # As far as llama.cpp goes with it, whose numbers are 8 bits wide on their way.
    for id, prompt, expected in (
        ("paris", "The Eiffel Tower is in the city of", " Paris, France. It is the tallest building in the world."),
        ("days", "Monday, Tuesday, Wednesday,", " Thursday, Friday, Saturday, Sunday"),
        ("ice", "Water freezes at", " 32 degrees Fahrenheit."),
    ):
        done = await client.generate(id=id, prompt=prompt, temperature=0, max_tokens=14)
        assert done["joined"].startswith(expected)
        assert len(client.of(id, "token")) > 1
        assert (done["finish_reason"], done["usage"]["completion_tokens"]) == ("length", 14)
    done = await client.generate(id="chat", messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
    assert done["error"]["code"] == "unsupported"


@pytest.mark.asyncio(loop_scope="module")
async def test_what_it_takes_was_told_beforehand(client: Client, folder: Path):
    await client.generate(id="g", prompt="Hi", max_tokens=1)
    (entry,) = (await client.settle())["models"]
    told = plan(folder, LoadOptions("float32", "cpu", kv_memory=64 << 20)).memory_bytes
    assert told == pytest.approx(entry["memory_bytes"], rel=0.1)


@pytest.mark.parametrize("text", IDS)
def test_its_tokenizer_is_llama_cpps(tokenizer: PreTrainedTokenizerFast, text: str):
    ids = encode(tokenizer.backend_tokenizer, text)
    assert ids == IDS[text]
    assert tokenizer.decode(ids[1:]) == text


def test_the_instruction_tuned_ones_conversation_is_llama_cpps_and_ends_with_the_turn(
    file: GgufFile, tokenizer: PreTrainedTokenizerFast
):
    tokenizer.chat_template = GEMMA_TEMPLATE
    template = _chat_template(tokenizer)
    model = LoadedModel(EchoRunner(), tokenizer.backend_tokenizer, 4096, 262144, "none", "cpu", template)
    ids = InstructionTuned().encode_chat(model, MESSAGES)
    assert ids == CHAT_IDS
    assert ids == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert InstructionTuned()._end_token_ids(model) == {1, END_OF_TURN}
    assert end_token_ids(file) == [1, END_OF_TURN]
