"""Every attack against every defence, on small CLIPs: `make bench-defenses`.

    python benchmarks/bench_defenses.py [options of `pydetox bench`]

Prints the table and the figures, and writes runs/defenses/: summary.json, report.html, results.csv,
results.md and, in CLIP_benchmark's layout, results/. It is no pytest benchmark: `make bench` leaves
it out.

The full run must end within 100 minutes on two cores. Planned, in seconds of one core, from the
rates of single steps (images a second and core: training 900, evaluation 5,100, search 1,900) and
the number of images that each part passes; 13 attacks and 6 clean models on each of 3 seeds, and 2
tuning models on a fourth:

    4 base models                10 passes over 12,000 images     460
    59 suspects                   5 passes over 8,000 images    2,600
    4 calibrations                5 references each               460
    tuning                        9 methods, 4 settings, 2 models 1,500
    pydetox, unknown trigger     39 victims, 75 and more each   3,200
    pydetox, known trigger       39 victims, 28                 1,100
    the other seven              39 victims, 84 together        3,300
    relapse                      39 victims, 2 methods, 9         700
    scans of clean models        18, 13                           240
    maps of xi                   99 models each                   120
    together                                                   13,700: 114 minutes on two cores

The rates are those of a machine busy with other work: an idle one has to be 15% faster for the plan
to hold, which is not measured yet. run.json has the seconds of every stage: hold them against this
table. What can be cut first: `Plan.clean_models` (16 are wanted) and `Plan.fine_tuning_images`.
"""

from __future__ import annotations

from pydetox.cli import main

if __name__ == "__main__":
    import sys

    sys.argv = ["pydetox", "bench", *sys.argv[1:]]
    main()
