"""The measurements by name; each gives one or more rows of the table, whose targets are in `bench/targets.py`."""

from bench.rows import engine, gpu, hostile, memory, mqtt, peers, server
from bench.runs import Measurement

MEASUREMENTS: dict[str, Measurement] = {
    **peers.ROWS,
    **server.ROWS,
    **memory.ROWS,
    **hostile.ROWS,
    **engine.ROWS,
    **mqtt.ROWS,
    **gpu.ROWS,
}
