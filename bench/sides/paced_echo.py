"""wsserver with its echo model on a clock: one step every so many milliseconds, like a real model's, but for no CPU time.

`python -m bench.sides.paced_echo MILLISECONDS [wsserver's options]`. With it every token is a frame of its own, which at the
echo model's full speed they would not be, and all CPU time is the server's own.
"""

import sys
import time

from LLM import model_srv_wsserver_echo
from LLM.engine.request import Sampled
from LLM.engine.sequence import Slice
from wsserver.__main__ import main


class PacedRunner(model_srv_wsserver_echo.EchoRunner):
    """Ends every step at the next tick; its KV cache is soon full, so that memory that goes on growing is a leak."""

    block_count = 8192
    tick = float(sys.argv.pop(1)) / 1000
    due = 0.0

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        """Wait for the tick, then advance each slice's sequence."""
        now = time.monotonic()
        self.due = max(self.due + self.tick, now)
        time.sleep(self.due - now)  # on the engine's thread, in the place of a model's forward pass
        return super().step(batch)


if __name__ == "__main__":
    model_srv_wsserver_echo.EchoRunner = PacedRunner  # type: ignore[misc]
    main()
