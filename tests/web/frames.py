"""How smoothly a long answer streams: `python -m tests.web.frames` measures the page's frames while one comes.

The echo model's tokens are single characters, so the text of 4,000 tokens at 60 a second is 16,000 of them at 240 a second,
each in a message of its own: more work for the page than the real thing.
"""

import asyncio
import socket
import sys
import tempfile
from pathlib import Path
from statistics import median

from playwright.async_api import expect

from tests.conftest import ECHO
from tests.test_main import process
from tests.web.chromium import chromium, opened

TOKENS = 16_000
STEP_MS = 1000 / 240
SECTION = """## Section {number}

A paragraph of *some* length, with **bold words**, `code` and [a link](https://example.com), as an answer has them. {words}

1. first point, which is a sentence of its own
2. second point
   - with a point below it, number {number}

```python
def section_{number}(value: int) -> int:
    return value * {number}  # {words}
```

| name | value |
|---|---|
| number | {number} |
| words | {words} |

"""
# `idle` first, when nothing comes, to compare with on the same machine; then without an end.
RECORD = """(idle) => new Promise((resolve) => {
  window.frames_ms = [];
  let last = performance.now();
  const frame = (now) => {
    window.frames_ms.push(now - last);
    last = now;
    if (window.frames_ms.length === idle) resolve(window.frames_ms);
    else requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  if (!idle) resolve();
})"""


def answer() -> str:
    sections = (SECTION.format(number=number, words="word " * (number % 40)) for number in range(1000))
    text = ""
    while len(text) < TOKENS // 2:
        text += next(sections)
    # The rest is one block, which has no end until the end.
    return (text + "```text\n" + "".join(f"line {number} of a long block\n" for number in range(1000)))[:TOKENS]


async def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    command = (sys.executable, "-m", "bench.sides.paced_echo", str(STEP_MS), "--model", ECHO, "--port", str(port))
    with tempfile.TemporaryDirectory() as folder:
        async with process(Path(folder), *command) as server:
            await server.says()
            async with chromium() as browser, opened(browser, f"ws://127.0.0.1:{port}/ws") as tab:
                await tab.question.fill(answer())
                idle = await tab.page.evaluate(RECORD, 600)
                await tab.page.evaluate(RECORD, 0)
                await tab.send.click()
                await expect(tab.facts).to_contain_text("tokens/s", timeout=300_000)
                busy = await tab.page.evaluate("window.frames_ms")
                facts = await tab.facts.inner_text()
    sys.stdout.write(f"{facts}\nidle:      {told(idle)}\nstreaming: {told(busy)}\n")


def told(frames: list[float]) -> str:
    frames, seconds = sorted(frames), sum(frames) / 1000
    late = 100 * sum(frame > 50 for frame in frames) / len(frames)
    return (
        f"{len(frames)} frames, {len(frames) / seconds:.1f} a second; median {median(frames):.1f} ms, "
        f"p99 {frames[len(frames) * 99 // 100]:.1f} ms, worst {frames[-1]:.1f} ms, {late:.1f} % over 50 ms"
    )


if __name__ == "__main__":
    asyncio.run(main())
