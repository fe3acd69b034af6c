"""Turns a folder into a model that runs: order of loads, memory, the files' contents. Knows no client and no socket."""
