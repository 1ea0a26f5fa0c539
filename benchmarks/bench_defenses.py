"""Every attack against every defence, on small CLIPs: `make bench-defenses`.

    python benchmarks/bench_defenses.py [options of `pydetox bench`]

Prints the table and the figures, and writes runs/defenses/: summary.json, report.html, results.csv,
results.md and, in CLIP_benchmark's layout, results/. It is no pytest benchmark: `make bench` leaves
it out.

The full run must end within 100 minutes on two cores. In seconds of one core, from single steps of
a run that was not finished, two processes side by side; 13 attacks and 7 clean models on each of 3
seeds, 2 tuning models on a fourth, 4 references on each, about 33 victims that take:

    4 base models                135 each                         540
    78 fine-tunings              33 each, 66 for 9 of them      2,870
    4 calibrations               115 each                         460
    tuning                       9 methods, 4 settings, 2 models 1,530
    pydetox, unknown trigger     33 victims, 90 each, or 150 where a second round follows
                                                                3,900
    pydetox, known trigger       33 victims, 12                   400
    the other seven              33 victims, about 55 together  1,800
    relapse                      33 victims, 2 methods, 7 each    460
    scans of clean models        21, 17                           360
    maps of xi                   an estimate                      120
    together                                                   12,440: 104 minutes on two cores

That is over the bound. Second rounds come mostly of re-scans that flag the repaired model for
another class than its target; without them it is 95 minutes. run.json has the seconds of every
stage: hold them against this table. What can be cut first: `Plan.clean_models` (16 are wanted).
"""

from __future__ import annotations

from pydetox.cli import main

if __name__ == "__main__":
    import sys

    sys.argv = ["pydetox", "bench", *sys.argv[1:]]
    main()
