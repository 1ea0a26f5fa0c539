"""Every attack against every defence, on small CLIPs: `make bench-defenses`.

    python benchmarks/bench_defenses.py [options of `pydetox bench`]

Prints the table and the figures, and writes runs/defenses/: summary.json, report.html, results.csv,
results.md and, in CLIP_benchmark's layout, results/. It is no pytest benchmark: `make bench` leaves
it out.

The full run should end within 100 minutes on two cores; the one of docs/results.md, from an empty
cache, took 138. Minutes of its stages, with two processes:

    bases                         5      4
    suspects                     26      39 victims, 21 clean models
    tuning models                 1
    reference models              6      16
    calibrations                  3.5    4
    tuning                       15      9 methods, 4 settings, 2 models
    defences                     76      32 victims: about 12 with the known trigger, 44 without it,
                                         20 for the other seven methods
    scans of clean models         4.5    21
    maps of xi                    2

What can be cut first: settings of the unknown trigger (two minutes each), or one of its passes.
"""

from __future__ import annotations

from pydetox.cli import main

if __name__ == "__main__":
    import sys

    sys.argv = ["pydetox", "bench", *sys.argv[1:]]
    main()
