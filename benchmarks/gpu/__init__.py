"""`make check-gpu`: prove on a GPU that pydetox is right, and measure how fast it is.

The parts, in order of value, are in `plan`; `__main__` runs them, each with its own time limit and
log, and rewrites summary.json after each. `stages` is the process that measures. What is here is in
two halves: `__main__`, `plan`, `processes`, `summary`, `events`, `machine`, `native`, `bundle` and
`page` need nothing but the standard library, so that they run where pydetox is not built yet; the
rest runs in processes of its own, on torch and pydetox.
"""
