"""The benchmark: `python -m bench`. Measures the server beside its peers, over its wire; knows nothing of its inside.

`rows/` says what is measured and `targets.py` what it is to reach; `sides/` has a file for each server and library,
which run in processes of their own, started fresh for every measurement; `load.py` asks, `measure.py` does the arithmetic.
"""
