"""wsserver that writes into a file how much CPU time its model has used, so that the rest can be told from it.

`python -m bench.sides.metered FILE [wsserver's options]`, for one compute thread. The model is what a step calls: the
forward pass, and the draw of the tokens.
"""

import mmap
import sys
import time
from pathlib import Path
from struct import Struct

from LLM import loader
from LLM.engine.request import Sampled
from LLM.engine.runner import PagedRunner
from LLM.engine.sequence import Slice
from wsserver.__main__ import main

SECONDS = Struct("d")


class MeteredRunner(PagedRunner):
    """Counts the CPU time of its steps."""

    memory: mmap.mmap
    seconds = 0.0

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        """Advance each slice's sequence, and write down the CPU time of that."""
        began = time.thread_time()
        sampled = super().step(batch)
        self.seconds += time.thread_time() - began
        SECONDS.pack_into(self.memory, 0, self.seconds)
        return sampled


def model_seconds(path: Path) -> float:
    """Give what the model of the process that writes to `path` has used so far."""
    seconds: float = SECONDS.unpack(path.read_bytes())[0]
    return seconds


if __name__ == "__main__":
    with Path(sys.argv.pop(1)).open("w+b") as file:
        file.write(SECONDS.pack(0.0))
        file.flush()
        MeteredRunner.memory = mmap.mmap(file.fileno(), SECONDS.size)
    vars(loader).update(PagedRunner=MeteredRunner)
    main()
