"""Every attack against every defence, on small CLIPs: `make bench-defenses`.

    python benchmarks/bench_defenses.py [options of `pydetox bench`]

Prints the table and the figures, and writes runs/defenses/: summary.json, report.html, results.csv,
results.md and, in CLIP_benchmark's layout, results/. It is no pytest benchmark: `make bench` leaves
it out.

The full run must end within 100 minutes on two cores. Planned, in seconds of one core, from single
steps on models of seeds that the plan keeps or does not use, two processes side by side; 13 attacks
and 7 clean models on each of 3 seeds, and 2 tuning models on a fourth:

    4 base models                110 each                         440
    62 suspects                  33 each, 66 for 9 of them      2,350
    4 calibrations               94 each                          380
    tuning                       9 methods, 4 settings, 2 models 1,100
    pydetox, unknown trigger     39 victims, 53                 2,070
    pydetox, known trigger       39 victims, 15                   590
    the other seven              39 victims, about 60 together  2,340
    relapse                      39 victims, 2 methods, 7 each    550
    scans of clean models        21, 8                            170
    maps of xi                                                    120
    together                                                   10,110: 84 minutes on two cores

The other seven, the tuning and the maps are estimates. run.json has the seconds of every stage:
hold them against this table. What can be cut first: `Plan.clean_models` (16 are wanted).
"""

from __future__ import annotations

from pydetox.cli import main

if __name__ == "__main__":
    import sys

    sys.argv = ["pydetox", "bench", *sys.argv[1:]]
    main()
