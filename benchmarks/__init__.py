"""Benchmarks, one package a suite: `make bench SUITE=start`."""
