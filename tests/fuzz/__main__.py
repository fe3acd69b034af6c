"""`python -m tests.fuzz [FRAMES [SEED]]`: fuzz with so many frames; tell how fast that went, and what memory it took."""

import asyncio
import ctypes
import gc
import sys
import time
from pathlib import Path

from tests.fuzz.fuzzed import fuzzing
from tests.fuzz.messages import Draw, life

# The engine's thread and this one hand much to each other, and wait so long at most for their turn.
TURN = 0.0005
FRAMES, SEED = 1_000_000, 1
LIFE = 700  # frames of a connection at most: some come to the end of what they may send at once
WARM_UP = 0.1  # share of the frames
ROOM = 8 << 20  # bytes by which memory may grow after the warm-up


def resident() -> int:
    """Give this process's resident memory, in bytes, without what its allocator only keeps for later."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def main(frames: int = FRAMES, seed: int = SEED) -> int:
    """Fuzz; give the exit code, 1 if memory has grown too much. What goes wrong otherwise is raised."""
    draw, start, began, warm = Draw(seed), resident(), time.monotonic(), 0
    async with fuzzing() as fuzz:
        while fuzz.frames < frames:
            await fuzz.live(life(draw, draw.randint(1, LIFE)))
            if not warm and fuzz.frames >= frames * WARM_UP:
                warm = resident()
        seconds, end = time.monotonic() - began, resident()
    print(f"{fuzz.frames} frames of seed {seed}, {fuzz.frames / seconds:.0f} a second, were answered with")
    print(", ".join(f"{count} {what}" for what, count in fuzz.told.most_common()))
    sizes = {"at the start": start, "after the warm-up": warm, "at the end": end}
    print(f"{fuzz.answers} answers beside them were exact")
    print("MiB: " + ", ".join(f"{size / 2**20:.1f} {when}" for when, size in sizes.items()))
    return int(end - warm > ROOM)


if __name__ == "__main__":
    sys.setswitchinterval(TURN)
    sys.exit(asyncio.run(main(*map(int, sys.argv[1:]))))
