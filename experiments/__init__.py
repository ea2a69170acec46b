"""Studies and figures: each is one file, run with `python -m experiments.NAME`, with its results beside it.

This floor may import every other one; nothing imports it.
"""
