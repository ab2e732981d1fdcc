"""Measurements: `python -m bench` prints one table, `python -m bench.profiled` where time goes."""
