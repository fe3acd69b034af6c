"""The bench's pure parts: its definitions, statistics, table and results file; and that its GGUF file is the model."""

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import load, measure, table
from bench.gguf_model import permuted, write
from bench.load import Request
from bench.machine import step_bytes
from bench.measure import Spread, Trace
from bench.rows import MEASUREMENTS
from bench.rows.memory import Soak
from bench.table import Results, Row, Run
from bench.targets import TARGETS, Target


def trace(sent: float, *arrivals: float, tokens: int = 0, ended: float | None = None) -> Trace:
    last = arrivals[-1] if arrivals else sent
    return Trace(sent, arrivals, last if ended is None else ended, 5, tokens or len(arrivals))


def test_the_first_token_counts_from_sending_and_the_others_from_arrival_to_arrival():
    seen = trace(10.0, 10.5, 10.75, 11.75, tokens=6)
    assert (seen.ttft, seen.itls) == (0.5, [0.25, 1.0])


def test_time_per_token_divides_by_the_tokens_that_the_server_counted_not_by_frames():
    assert trace(0.0, 1.0, 2.0, 6.0, tokens=11).tpot == pytest.approx(0.5)


def test_an_answer_without_text_or_with_one_token_has_no_time_per_token():
    assert trace(3.0, tokens=7, ended=4.0).ttft == 1.0
    assert trace(3.0, tokens=7, ended=4.0).tpot == trace(3.0, 4.0).tpot == 0.0


def test_a_load_s_rate_goes_from_the_first_request_to_the_last_end():
    both = [trace(0.0, 1.0, tokens=30, ended=2.0), trace(1.0, 2.0, tokens=10, ended=4.0)]
    assert measure.tokens_per_second(both) == 10.0


def test_steady_gaps_are_those_while_every_stream_decodes():
    early, late = trace(0.0, 1.0, 2.0, 3.0, 4.0), trace(0.0, 2.0, 3.5, 5.0, 6.0)
    assert measure.steady_itls([early, late]) == [1.0, 1.0, 1.5]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_a_quantile_is_numpy_s_percentile_as_in_vllm_s_benchmark(share: float):
    values = [random.Random(1).random() for _ in range(37)]
    assert measure.quantile(values, share) == pytest.approx(np.percentile(values, 100 * share))


def test_no_values_have_no_quantile():
    with pytest.raises(ValueError, match="no values"):
        measure.quantile([], 0.5)


def test_a_ratio_is_that_of_the_medians_and_its_extremes_are_of_neighbouring_runs():
    assert measure.ratio([10, 20, 30], [10, 10, 40]) == Spread(2.0, 0.75, 2.0)


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (Target("", must=1.0, stretch=1.5), 1.5, "stretch"),
        (Target("", must=1.0, stretch=1.5), 1.49, "must"),
        (Target("", must=1.0, stretch=1.5), 0.99, "misses"),
        (Target("", must=5.0, at_most=True), 5.0, "must"),
        (Target("", must=0.3, stretch=0.1, at_most=True), 0.1, "stretch"),
        (Target("", must=0.3, stretch=0.1, at_most=True), 0.31, "misses"),
        (Target(""), 1.0, ""),
    ],
)
def test_a_verdict_names_the_better_mark_that_is_reached(target: Target, value: float, verdict: str):
    assert target.verdict(value) == verdict


def test_every_target_belongs_to_a_measurement():
    assert {name.partition(".")[0] for name in TARGETS} == set(MEASUREMENTS)


def test_the_table_shows_figures_spreads_marks_and_what_could_not_be_measured():
    rows = [table.compared("clients_16.serve", [40.0, 50.0], [10.0, 10.0], floor_share=0.25), Row("chat", note="gone")]
    lines = table.text(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][2:9] == ["45 tok/s (40 to 50)", "10 tok/s", "4.5 x (4 to 5)", ">= 4", ">= 6", "must", "25%"]
    assert cells[3][2:] == ["", "", "", "<= 1.1", "", "not measured", "", "gone"]
    assert len({len(line) for line in lines}) == 1


def test_a_soak_tells_the_memory_at_its_marks_and_how_much_it_grew_since_the_warm_up():
    mib = 1 << 20
    found = Soak(10 * mib, [(20 + i) * mib for i in range(20)] + [25 * mib], Counter(length=3, cancelled=1))
    assert found.growth == 3.0
    assert found.line() == (
        "MiB: 10.0 at the start, 22.0 after the warm-up, 25.0 at the end, 39.0 at most; 1 cancelled, 3 length"
    )


def run(date: str, *rows: Row) -> Run:
    return Run("a machine", date, "python -m bench", "idle", rows)


def test_a_row_measured_anew_replaces_the_old_one_and_one_that_failed_does_not(tmp_path: Path):
    results = Results(tmp_path)
    results.add(run("monday", table.single("chat", [1.0, 2.0]), Row("cancel", note="no GPU")))
    results.add(run("tuesday", table.single("cancel", [0.5]), Row("chat", note="broke")))
    results.add(run("wednesday", table.single("cancel", [0.25]), Row("chat", note="broke again")))
    kept = [(stored.date, row.name, row.value) for stored in results.read() for row in stored.rows]
    assert kept == [("wednesday", "cancel", Spread(0.25, 0.25, 0.25)), ("monday", "chat", Spread(1.5, 1.0, 2.0))]
    shown = (tmp_path / "RESULTS.md").read_text()
    assert "monday" in shown
    assert "tuesday" not in shown


def test_prompts_are_the_same_for_everybody_of_mixed_length_and_begin_differently():
    texts = load.prompts(16)
    assert texts == load.prompts(16) != load.prompts(16, seed=1)
    assert [len(text.split()) - 1 for text in texts] == list(load.LENGTHS * 2)
    assert len({text.split()[0] for text in texts}) == 16


async def test_a_closed_loop_keeps_every_client_busy_and_asks_everything_once():
    asked = [Request(str(i), 1) for i in range(10)]
    running: list[int] = [0]
    most: list[int] = []

    async def stream(request: Request) -> Trace:
        running[0] += 1
        most.append(running[0])
        await asyncio.sleep(0)
        running[0] -= 1
        return trace(float(request.prompt), 1.0)

    traces = await load.closed_loop(stream, 4, asked)
    assert sorted(t.sent for t in traces) == [float(i) for i in range(10)]
    assert max(most) == 4


async def test_poisson_arrivals_do_not_wait_for_answers():
    asked = [Request(str(i), 1) for i in range(5)]
    all_there = asyncio.Barrier(len(asked))

    async def stream(request: Request) -> Trace:
        await all_there.wait()
        return trace(float(request.prompt), 1.0)

    traces = await load.poisson(stream, 1e9, asked)
    assert [t.sent for t in traces] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a tiny Llama with grouped heads, whose matrices are all different."""
    folder = tmp_path_factory.mktemp("llama")
    config: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **config, **heads, tie_word_embeddings=False)).bfloat16().save_pretrained(
        folder
    )
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "ab", "12"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("a", "b"), ("1", "2")]))
    tokenizer.add_special_tokens(["<|end|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_holds_the_very_weights_of_the_folder_once_its_loader_has_put_them_in_order(
    llama: Path, tmp_path: Path, dtype: str
):
    write(llama, tmp_path / "model.gguf", dtype)
    source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "model.gguf", "local_files_only": True}
    found = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_rotating_neighbours_in_the_new_order_is_rotating_halves_in_the_old_one():
    rows = np.arange(16).reshape(16, 1)  # two heads of eight
    halves = [(head * 8 + i, head * 8 + i + 4) for head in range(2) for i in range(4)]
    assert [tuple(pair) for pair in permuted(rows, 2).reshape(8, 2)] == halves


def test_a_model_that_is_no_llama_is_not_written(llama: Path, tmp_path: Path):
    config = (llama / "config.json").read_text().replace("LlamaForCausalLM", "QwenForCausalLM")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="no plain Llama"):
        write(tmp_path, tmp_path / "model.gguf", "float32")


def test_a_step_reads_all_weights_but_the_embedding_once_and_the_cache_of_every_stream(llama: Path):
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    weights = 2 * layer + 32 + 259 * 32
    cache_of_a_token = 2 * 2 * 2 * 8
    assert step_bytes(llama, "bfloat16", 4, 100) == 2 * (weights + 400 * cache_of_a_token)
