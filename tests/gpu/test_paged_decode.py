"""The decode kernel on a GPU: every case that is interpreted on a CPU, bfloat16, long contexts, and inside a graph."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the decode kernel needs Triton, which there is for Linux alone")

from LLM.engine.paged_decode import paged_decode
from tests.test_paged_decode import BLOCK_SIZE, CASES, Case, compare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Of scores and weights, which 16-bit types round before they are multiplied.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_attends_every_row_to_its_own_sequence_alone(name: str, dtype: torch.dtype):
    found, expected = compare(replace(CASES[name], dtype=dtype), "cuda")
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_long_contexts_and_many_rows_do(dim: int, dtype: torch.dtype):
    lengths = tuple(1 + 997 * n * n % 6000 for n in range(64))
    found, expected = compare(Case(heads=24, kv_heads=8, dim=dim, dtype=dtype, lengths=lengths, splits=None), "cuda")
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_graph_reads_lengths_and_tables_of_its_replay():
    torch.manual_seed(1)
    # Drawn on the CPU: once a recording has failed in a process, CUDA's own generator raises.
    keys, values = torch.randn(2, 40, BLOCK_SIZE, 2, 64).to("cuda")
    query = torch.randn(3, 4, 64).to("cuda")
    table = torch.zeros(3, 20, dtype=torch.int32, device="cuda")
    lengths = torch.ones(3, dtype=torch.int32, device="cuda")
    paged_decode(query, keys, values, table, lengths)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = paged_decode(query, keys, values, table, lengths)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        table.copy_(torch.stack([torch.randperm(40, generator=generator)[:20] for _ in range(3)]))
        lengths.copy_(torch.randint(1, 320, (3,), generator=generator))
        graph.replay()
        torch.testing.assert_close(output, paged_decode(query, keys, values, table, lengths))
