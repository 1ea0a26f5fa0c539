"""What benchmarks, tests and the demo need: attacks, defences, the demo and the benchmark."""
