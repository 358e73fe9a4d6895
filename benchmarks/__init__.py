"""Benchmarks, one module a suite: `make bench SUITE=start`."""
