"""The harness that the tests, the demos and the benchmarks share."""
