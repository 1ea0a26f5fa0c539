"""Judging a model: searches in every class, compared with those in clean references.

`configuration` describes a scan. `references` decides what it compares with. `calibrate` searches
the references, and `key` records everything that their sizes depend on. `scan` searches a suspect.
`calibration`, `scatter` and `statistics` judge the sizes.
"""
