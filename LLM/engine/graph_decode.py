"""Steps of few tokens as CUDA graphs: what a step launches is recorded once for each of a few sizes, then replayed.

Sizes are recorded, so each token is a row of its own, with its own view of the cache, those of a prompt as well as one that
was sampled. What changes from step to step comes from one tensor of numbers on the device: token ids, positions and block
tables. A step is padded to the next size that was recorded, by rows that write to a block which belongs to nobody. Knows no
scheduling, and of sampling only the likeliest token. Only to be imported where triton is.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from LLM.engine.attention import PagedCache
from LLM.engine.paged_decode import paged_decode
from LLM.engine.request import GenerationRequest
from LLM.engine.rounding import tolerance
from LLM.engine.runner import ends_of
from LLM.engine.sampler import likeliest
from LLM.engine.sequence import IN_FLIGHT, Sequence, Slice

log = logging.getLogger(__name__)

# Rows; between powers of two there is another one where a step takes longer with every row.
SIZES = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16, 8, 4, 2, 1)
LARGEST = SIZES[0]
# How many tokens a step's prompts may see, added up over their rows: each row reads them all anew.
MOST_SEEN = 1 << 18
PROBE = 24  # tokens that every recording is checked by: more than a block

# The lines of a step's numbers, each with a place for every row: its token, or which of the last step's tokens it is; its
# position; and per slice which row is its end. The block tables take the rest, so that what is copied ends with the longest.
TOKEN, SOURCE, POSITION, END, TABLE = 0, 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What every layer must know of a step whose tokens are each a row, all of it on the device.

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
    """The numbers of a step as the host writes them.

    They may be written again once the step that they were copied for has been waited for.
    """

    def __init__(self, rows: int, blocks: int, trash_block: int, pinned: bool) -> None:
        self.tensor = torch.zeros(TABLE + blocks, rows, dtype=torch.int32, pin_memory=pinned)
        self.tensor[TABLE] = trash_block
        self._written = self.tensor.numpy()
        self._trash_block = trash_block
        # The list of blocks that each row's table was written from, and how many it had then.
        self._known: list[tuple[list[int], int]] = [([], 0)] * rows

    def write(self, batch: list[Slice], rows: int, in_flight: Mapping[Sequence, int]) -> int:
        """Put a batch's tokens into the first `rows` rows, what disturbs nobody into those left over; give the lines used.

        `in_flight` has the places of the last step's tokens, by sequence.
        """
        tokens: list[int] = []
        sources: list[int] = []
        positions: list[int] = []
        for part in batch:
            row, ids = len(tokens), part.sequence.token_ids[part.start : part.stop]
            flies = ids[-1] == IN_FLIGHT
            tokens += ids
            sources += [*[IN_FLIGHT] * (len(ids) - 1), in_flight[part.sequence] if flies else IN_FLIGHT]
            positions += range(part.start, part.stop)
            self._write_table(row, len(tokens), part.sequence.blocks)
        n = len(tokens)
        self._written[:END, :n] = tokens, sources, positions
        self._written[END, : len(batch)] = ends_of(batch)
        self._written[END, len(batch) : rows] = 0
        self._written[:END, n:rows] = [[0], [IN_FLIGHT], [0]]
        self._written[TABLE, n:rows] = self._trash_block
        self._known[n:rows] = [([], 0)] * (rows - n)
        return TABLE + max(len(part.sequence.blocks) for part in batch)

    def _write_table(self, row: int, end: int, blocks: list[int]) -> None:
        # A sequence's list of blocks only ever grows; one that lost its blocks has another list afterwards.
        known, count = self._known[row]
        first = count if known is blocks and end == row + 1 else 0
        if first < len(blocks):
            self._written[TABLE + first : TABLE + len(blocks), row:end].T[:] = blocks[first:]
            self._known[row:end] = [(blocks, len(blocks))] * (end - row)


class DecodeNumbers:
    """The numbers of a step on the device, copied there in one go and always at the same address, with the last tokens."""

    def __init__(self, cache: PagedCache, rows: int, blocks: int, trash_block: int, device: torch.device) -> None:
        self._cache = cache
        # Two, in turn: the next step may be launched while the last one is still on its way, but not the one before that.
        self._hosts = [HostNumbers(rows, blocks, trash_block, device.type == "cuda") for _ in range(2)]
        self._device = self._hosts[0].tensor.to(device, copy=True)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)

    def write(self, batch: list[Slice], rows: int, in_flight: Mapping[Sequence, int]) -> None:
        """Put a batch's tokens into the first `rows` rows; `in_flight` says which of `tokens` those in flight are."""
        host = self._hosts[0]
        self._hosts.reverse()
        used = host.write(batch, rows, in_flight)
        self._device[:used].copy_(host.tensor[:used], non_blocking=True)

    def read(self, rows: int) -> tuple[Tensor, Tensor, Tensor, DecodeStep]:
        """Give token ids and positions [1, rows], the slices' ends, and the step, by operations that a graph can hold."""
        numbers, size = self._device[:, :rows], self._cache.block_size
        positions, table = numbers[POSITION].long(), numbers[TABLE:].t()
        # A row that failed has no token; its next one is for nothing, but must not be looked up out of bounds.
        flown = self.tokens.index_select(0, numbers[SOURCE].clamp(min=0)).clamp(min=0)
        ids = torch.where(numbers[SOURCE] == IN_FLIGHT, numbers[TOKEN], flown)
        blocks = table.gather(1, (positions // size)[:, None])[:, 0]
        slots = blocks.long() * size + positions % size
        step = DecodeStep(self._cache, slots, table, numbers[POSITION] + 1)
        return ids[None], positions[None], numbers[END], step


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded step: `replay` runs it again, which changes `logits` [slices, vocabulary] in place."""

    replay: Callable[[], None]
    logits: Tensor
    pool: Any


def record(run: Callable[[], Tensor], pool: Any) -> Recording:
    """Record what `run` launches, with memory from `pool`, that of an earlier recording; None makes one."""
    run()  # once for real: kernels are compiled and libraries set up, which no recording can hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other models' threads may go on using the device meanwhile. And this one may happen to collect the graphs of a model
    # that is gone, which in any stricter mode would end the recording.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
        logits = run()
    return Recording(graph.replay, logits, graph.pool())


class GraphDecoder:
    """Runs steps of a paged model that carry few tokens, of up to `capacity` sequences.

    To be made on the thread that uses it, once the model attends over `cache`, and to be checked before it is used.
    `trash_block` is a block of the cache that no sequence has, `blocks` the most that one can have.
    """

    def __init__(self, model: Any, cache: PagedCache, trash_block: int, capacity: int, blocks: int) -> None:
        self._model = model
        self._capacity = capacity
        self._block_size = cache.block_size
        self._recordings: dict[int, Recording] = {}
        self._failures: dict[int, str] = {}
        self._numbers = DecodeNumbers(cache, LARGEST, blocks, trash_block, model.device)
        # The largest first: what the smaller ones need is then in the pool already.
        for rows in SIZES:
            self._try_to_record(rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of rows that were recorded, in rising order."""
        return tuple(sorted(self._recordings))

    @property
    def tokens(self) -> Tensor:
        """The likeliest token after each slice of the last step; others may be put in their place."""
        return self._numbers.tokens

    @property
    def note(self) -> str | None:
        """What was not recorded and why; None if nothing is missing."""
        missing = [f"{rows} ({why})" for rows, why in sorted(self._failures.items())]
        if self._capacity > LARGEST:
            missing.append(f"more than {LARGEST}")
        return f"no CUDA graphs for batches of {', '.join(missing)}" if missing else None

    def takes(self, batch: list[Slice]) -> bool:
        """Whether a step is one that was recorded: not too many tokens, of prompts that do not see too far back."""
        rows = sum(part.stop - part.start for part in batch)
        seen = sum((n := part.stop - part.start) * (part.stop - n // 2) for part in batch if part.stop - part.start > 1)
        return 0 < rows <= max(self._recordings, default=0) and len(batch) <= self._slices(rows) and seen <= MOST_SEEN

    @torch.inference_mode()
    def forward(self, batch: list[Slice], in_flight: Mapping[Sequence, int]) -> Tensor:
        """Give the logits [slices, vocabulary] after each slice of a step that it takes, valid until the next one.

        `in_flight` has the places in `tokens` of those that only the device knows yet, by sequence. The step before the last
        one must have been waited for, as whoever reads its tokens does.
        """
        tokens = sum(part.stop - part.start for part in batch)
        return self._replay(min(size for size in self._recordings if size >= tokens), batch, in_flight)

    @torch.inference_mode()
    def check(self, eager: Callable[[list[Slice], list[int]], Tensor]) -> None:
        """Compare every recording with a prefill by `eager`, the runner's forward pass, and drop those that differ.

        To be called before there are sequences: it writes to the first blocks of the cache.
        """
        size = self._model.config.get_text_config().vocab_size
        ids = tuple((7919 * i + 11) % size for i in range(PROBE))
        sequence = Sequence(GenerationRequest("probe", ids, 1), blocks=list(range(-(-PROBE // self._block_size))))
        last = Slice(sequence, PROBE - 1, PROBE)
        expected = eager([Slice(sequence, 0, PROBE)], [PROBE - 1]).float().cpu()
        for rows in self.sizes:
            for start in range(0, PROBE - 1, rows):
                self._replay(rows, [Slice(sequence, start, min(start + rows, PROBE - 1))], {}).cpu()
            # The rows are one and the same sequence: all write the same to the same place.
            found = self._replay(rows, [last] * self._slices(rows), {}).float().cpu()
            errors = (found - expected).norm(dim=-1) / expected.norm()
            # Either may be as far from what is right: 32 layers of random bfloat16 weights were 7e-2 apart on an H100.
            if not errors.max() < 2 * tolerance(self._model):
                self._fails(rows, f"differs from the eager step by {errors.max():.1e}")

    def _replay(self, rows: int, batch: list[Slice], in_flight: Mapping[Sequence, int]) -> Tensor:
        self._numbers.write(batch, rows, in_flight)
        self._recordings[rows].replay()
        return self._recordings[rows].logits[: len(batch)]

    def _slices(self, rows: int) -> int:
        return min(rows, self._capacity)

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
        ids, positions, ends, step = self._numbers.read(rows)
        kept = ends[: self._slices(rows)]
        output = self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=kept, step=step)
        logits: Tensor = output.logits[0]
        self.tokens[: len(logits)] = likeliest(logits)
        return logits
