"""Every attack against every defence, on small CLIPs: `make bench-defenses`.

    python benchmarks/bench_defenses.py [options of `pydetox bench`]

Prints the table and the figures, and writes runs/defenses/: summary.json, report.html, results.csv,
results.md and, in CLIP_benchmark's layout, results/. It is no pytest benchmark: `make bench` leaves
it out.

The full run should end within 100 minutes on two cores, and by the measurements below it needs
about 107. Minutes of stages that ran side by side in two processes; a run from an empty cache has
not been made.

    bases                         4.5    4
    suspects                     20      39 victims, 21 clean models
    tuning models                 0.6
    reference models              5      16 (33 s of one core each)
    calibrations                  2.5    4
    tuning                       11      9 methods, 4 settings, 2 models
    pydetox, unknown trigger     29      32 victims, 103 s each, and the relapse
    pydetox, known trigger        5.5    12 s each, and the relapse
    the other seven              24      32 victims, about 70 s together
    scans of clean models         3.5    21
    maps of xi                    1.4

What can be cut first: `Plan.clean_models` (16 are wanted), or a pass of the unknown trigger.
"""

from __future__ import annotations

from pydetox.cli import main

if __name__ == "__main__":
    import sys

    sys.argv = ["pydetox", "bench", *sys.argv[1:]]
    main()
