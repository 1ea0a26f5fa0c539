"""Research: attacks to plant, defences to compare with, the demo and the benchmarks."""
