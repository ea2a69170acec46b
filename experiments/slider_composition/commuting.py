"""Does it matter which slider comes first along the way from noise to image, and do weights foretell it?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.slider_composition.composing import NAMES
from experiments.slider_composition.lab import Lab, mean
from geoedit.algebra import commutator, overlap


def commutations(lab: Lab, composed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair: overlap and commutator of weights, both orders in time, and additivity when together."""
    labels, s = lab.settings.labels, lab.settings.scale
    pairs = list(combinations(labels, 2))
    cosines = overlap([lab.sliders[label] for label in labels])
    orders = [(lab.sliders[x], lab.sliders[y]) for a, b in pairs for x, y in ((a, b), (b, a))]
    changes, _ = lab.in_order(orders, s)
    single, _ = lab.effects(
        {label: lab.sliders[label] for label in labels}, [{label: at} for label in labels for at in (-s, s)]
    )
    ranges = [
        abs(float(mean(single[2 * i + 1] - single[2 * i], 0)[NAMES.index(n)])) for i, n in enumerate(labels)
    ]
    records = []
    for number, (a, b) in enumerate(pairs):
        i, j = labels.index(a), labels.index(b)
        places, scale = [NAMES.index(a), NAMES.index(b)], np.array([ranges[i], ranges[j]])
        forth, back = changes[2 * number][:, places], changes[2 * number + 1][:, places]
        joint = [
            record["additivity"]
            for record in composed
            if record["method"] == "exact" and set(record["sliders"]) == {a, b}
        ]
        records.append(
            {
                "a": a,
                "b": b,
                "overlap": float(cosines[i, j]),
                "commutator": commutator(lab.sliders[a], lab.sliders[b]).share,
                "order": float(mean(np.abs(forth - back) / scale)),
                "order_of_means": float(np.mean(np.abs(mean(forth - back, 0)) / scale)),
                "first": (mean(forth, 0) / scale).tolist(),
                "second": (mean(back, 0) / scale).tolist(),
                "additivity": float(np.mean(joint)),
            }
        )
    return records


def foretold(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlations over pairs of what weights say with what images show."""
    found: list[dict[str, Any]] = []
    for told in ("overlap", "commutator"):
        for shown in ("additivity", "order"):
            x, y = ([abs(record[name]) for record in records] for name in (told, shown))
            if len(x) < 4 or not np.isfinite([*x, *y]).all():
                found.append({"told": told, "shown": shown, "pairs": len(x), "spearman": None, "p": None})
                continue
            result = spearmanr(x, y)
            found.append(
                {
                    "told": told,
                    "shown": shown,
                    "pairs": len(x),
                    "spearman": float(result.statistic),
                    "p": float(result.pvalue),
                }
            )
    return found
