"""Decode steps as CUDA graphs: what a step launches is recorded once for each of a few batch sizes, then replayed.

Only steps of one token per sequence can be recorded, because sizes are. What changes from step to step comes from one tensor
of numbers on the device: token ids, positions and block tables. A batch is padded to the next size that was recorded, by
rows that write to a block which belongs to nobody. Knows no sampling and no scheduling. Only to be imported where triton is.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from LLM.engine.attention import PagedCache
from LLM.engine.paged_decode import paged_decode
from LLM.engine.request import GenerationRequest
from LLM.engine.rounding import tolerance
from LLM.engine.sequence import Sequence, Slice

log = logging.getLogger(__name__)

LARGEST = 64  # rows
PROBE = 24  # tokens that every recording is checked by: more than a block

# The columns of the numbers of a step; the block table takes the rest.
TOKEN, POSITION, TABLE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What every layer must know of a step of one token per row, all of it on the device.

    `slots` [rows] is where new keys and values go; `block_table` [rows, blocks] and `lengths` [rows] say what a row sees.
    """

    cache: PagedCache
    slots: Tensor
    block_table: Tensor
    lengths: Tensor

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend query [heads, rows, dimension] to a layer's keys and values; give [rows, heads, dimension]."""
        query = query.transpose(0, 1)
        return paged_decode(query, keys, values, self.block_table, self.lengths, scaling, window, softcap)


class HostNumbers:
    """The numbers of a decode step as the host writes them.

    They may be written again once the step that they were copied for has been waited for.
    """

    def __init__(self, rows: int, blocks: int, trash_block: int, pinned: bool) -> None:
        self.tensor = torch.zeros(rows, TABLE + blocks, dtype=torch.int32, pin_memory=pinned)
        self.tensor[:, TABLE] = trash_block
        self._written = self.tensor.numpy()
        self._trash_block = trash_block
        # The list of blocks that each row's table was written from, and how many it had then.
        self._known: list[tuple[list[int], int]] = [([], 0)] * rows

    def write(self, batch: list[Slice], rows: int) -> None:
        """Put a batch of one-token slices into the first `rows` rows, and what disturbs nobody into those left over."""
        n = len(batch)
        self._written[:n, TOKEN] = [part.sequence.token_ids[part.start] for part in batch]
        self._written[:n, POSITION] = [part.start for part in batch]
        for row, part in enumerate(batch):
            self._write_table(row, part.sequence.blocks)
        self._written[n:rows, : TABLE + 1] = (0, 0, self._trash_block)
        self._known[n:rows] = [([], 0)] * (rows - n)

    def _write_table(self, row: int, blocks: list[int]) -> None:
        # A sequence's list of blocks only ever grows; one that lost its blocks has another list afterwards.
        known, count = self._known[row]
        first = count if known is blocks else 0
        self._written[row, TABLE + first : TABLE + len(blocks)] = blocks[first:]
        self._known[row] = (blocks, len(blocks))


class DecodeNumbers:
    """The numbers of a decode step on the device, copied there in one go and always at the same address."""

    def __init__(self, cache: PagedCache, rows: int, blocks: int, trash_block: int, device: torch.device) -> None:
        self._cache = cache
        # Two, in turn: the next step may be launched while the last one is still on its way, but not the one before that.
        self._hosts = [HostNumbers(rows, blocks, trash_block, device.type == "cuda") for _ in range(2)]
        self._device = self._hosts[0].tensor.to(device, copy=True)

    def write(self, batch: list[Slice], rows: int, in_flight: tuple[Tensor, Tensor] | None = None) -> None:
        """Put a batch of one-token slices into the first `rows` rows, with the tokens that only the device knows yet."""
        host = self._hosts[0]
        self._hosts.reverse()
        host.write(batch, rows)
        self._device[:rows].copy_(host.tensor[:rows], non_blocking=True)
        if in_flight:
            places, tokens = in_flight
            self._device[places, TOKEN] = tokens.to(torch.int32)

    def read(self, rows: int) -> tuple[Tensor, Tensor, DecodeStep]:
        """Give token ids and positions [1, rows], and the step, as operations on the device that a graph can hold."""
        numbers, size = self._device[:rows], self._cache.block_size
        positions, table = numbers[:, POSITION].long(), numbers[:, TABLE:]
        blocks = table.gather(1, (positions // size)[:, None])[:, 0]
        slots = blocks.long() * size + positions % size
        step = DecodeStep(self._cache, slots, table, numbers[:, POSITION] + 1)
        return numbers[None, :, TOKEN].long(), positions[None], step


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded step: `replay` runs it again, which changes `logits` [rows, vocabulary] in place."""

    replay: Callable[[], None]
    logits: Tensor
    pool: Any


def record(run: Callable[[], Tensor], pool: Any) -> Recording:
    """Record what `run` launches, with memory from `pool`, that of an earlier recording; None makes one."""
    run()  # once for real: kernels are compiled and libraries set up, which no recording can hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other models' threads may go on using the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits = run()
    return Recording(graph.replay, logits, graph.pool())


class GraphDecoder:
    """Runs decode steps of up to `capacity` rows of a paged model.

    To be made on the thread that uses it, once the model attends over `cache`, and to be checked before it is used.
    `trash_block` is a block of the cache that no sequence has, `blocks` the most that one can have.
    """

    def __init__(self, model: Any, cache: PagedCache, trash_block: int, capacity: int, blocks: int) -> None:
        self._model = model
        self._capacity = capacity
        self._block_size = cache.block_size
        self._recordings: dict[int, Recording] = {}
        self._failures: dict[int, str] = {}
        sizes = sizes_for(capacity)
        self._numbers = DecodeNumbers(cache, sizes[0], blocks, trash_block, model.device)
        # The largest first: what the smaller ones need is then in the pool already.
        for rows in sizes:
            self._try_to_record(rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of rows that were recorded, in rising order."""
        return tuple(sorted(self._recordings))

    @property
    def note(self) -> str | None:
        """What was not recorded and why; None if nothing is missing."""
        missing = [f"{rows} ({why})" for rows, why in sorted(self._failures.items())]
        if self._capacity > LARGEST:
            missing.append(f"more than {LARGEST}")
        return f"no CUDA graphs for batches of {', '.join(missing)}" if missing else None

    def takes(self, batch: list[Slice]) -> bool:
        """Whether a step is one that was recorded: one token per slice, and not too many slices."""
        return 0 < len(batch) <= max(self._recordings, default=0) and all(part.stop - part.start == 1 for part in batch)

    @torch.inference_mode()
    def forward(self, batch: list[Slice], in_flight: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Give the logits [slices, vocabulary] of a step that it takes, valid until the next one.

        `in_flight` are the rows whose tokens only the device knows yet, and those tokens. The step before the last one must
        have been waited for, as whoever reads its tokens does.
        """
        rows = min(size for size in self._recordings if size >= len(batch))
        self._numbers.write(batch, rows, in_flight)
        self._recordings[rows].replay()
        return self._recordings[rows].logits[: len(batch)]

    @torch.inference_mode()
    def check(self, eager: Callable[[list[Slice], list[int]], Tensor]) -> None:
        """Compare every recording with a prefill by `eager`, the runner's forward pass, and drop those that differ.

        To be called before there are sequences: it writes to the first blocks of the cache.
        """
        size = self._model.config.get_text_config().vocab_size
        ids = tuple((7919 * i + 11) % size for i in range(PROBE))
        sequence = Sequence(GenerationRequest("probe", ids, 1), blocks=list(range(-(-PROBE // self._block_size))))
        expected = eager([Slice(sequence, 0, PROBE)], [PROBE - 1]).float().cpu()
        for rows in self.sizes:
            # The rows are one and the same sequence: all write the same to the same place.
            for n in range(PROBE):
                found = self.forward([Slice(sequence, n, n + 1)] * rows).float().cpu()
            errors = (found - expected).norm(dim=-1) / expected.norm()
            if not errors.max() < tolerance(self._model):
                self._fails(rows, f"differs from the eager step by {errors.max():.1e}")

    def _try_to_record(self, rows: int) -> None:
        pool = next((recording.pool for recording in self._recordings.values()), None)
        try:
            with torch.inference_mode():
                self._recordings[rows] = record(lambda: self._run(rows), pool)
        except torch.OutOfMemoryError:
            self._fails(rows, "out of memory", exc_info=True)
        except Exception:
            # Whatever another's code does that no graph can hold: without graphs it runs all the same.
            self._fails(rows, "the model cannot be recorded", exc_info=True)

    def _fails(self, rows: int, why: str, exc_info: bool = False) -> None:
        log.warning("no CUDA graph for batches of %d: %s", rows, why, exc_info=exc_info)
        self._failures[rows] = why
        self._recordings.pop(rows, None)

    def _run(self, rows: int) -> Tensor:
        ids, positions, step = self._numbers.read(rows)
        output = self._model(input_ids=ids, position_ids=positions, use_cache=False, step=step)
        logits: Tensor = output.logits[0]
        return logits


def sizes_for(capacity: int) -> list[int]:
    """Give the numbers of rows to record, falling: powers of two up to the first that holds `capacity`, or the largest."""
    powers = [2**n for n in range(LARGEST.bit_length())]
    return [rows for rows in reversed(powers) if rows < 2 * capacity]
