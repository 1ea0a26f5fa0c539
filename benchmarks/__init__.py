"""Benchmarks: not part of the package that is installed."""
