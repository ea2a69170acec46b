"""Ours and the peer in one run: each file measures one thing.

``python -m experiments.benchmarks`` runs all of them. The peers (pymanopt, stochman) come with the extra
``bench``. Every figure is a ratio of times that were taken in turn, with the spread of that ratio; what was
computed is compared as well.
"""
