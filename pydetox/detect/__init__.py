"""Judging a model: searches in every class, compared with those in clean references.

`configuration` says how, `references` what to compare with, `calibrate` searches the references,
`key` says what their sizes depend on, `scan` searches a suspect, `statistics` judges the sizes.
"""
