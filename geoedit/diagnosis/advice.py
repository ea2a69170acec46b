"""Which edit to make, by stated rules on what was predicted.

1. Where neither the edit itself, at any scale, nor the difference of the two values' own means is expected to
   arrive, the site does not carry the concept: **another site**.
2. Where the edit is expected to arrive and its end is off the concept's manifold by no more than the
   manifold's own noise, or nothing is known of the manifold: **linear**.
3. Where the end is farther off than that, an edit that follows the manifold: **tangent** where the curvature
   is reliable and the manifold turns by no more than one radian over the length of the vector, so that one
   step stays within its radius; **geodesic** where it turns further or nobody knows how it turns.
4. Where the edit would arrive at another scale: **linear**, at that scale.
5. Else **linear**, with the difference of the two values' own means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from geoedit.diagnosis.plan import MEAN_DIFFERENCE
from geoedit.diagnosis.result import SiteSummary

EVEN = 0.5
NOISE = 1.0
"""How many times the manifold's noise an edit may leave it by."""
RADIAN = 1.0
"""The turn over which one step along a tangent holds."""
LINEAR, TANGENT, GEODESIC, ELSEWHERE = "linear", "tangent", "geodesic", "another site"


@dataclass(frozen=True)
class Facts:
    """What is known of an edit before it is made; NaN where it is not.

    Attributes:
        probability: that it succeeds.
        off_relative: its distance off the manifold over the manifold's noise.
        turn: the curvature times the length of the vector, in radians; NaN where curvature is not reliable.
        safe_low: the lower end of the scales at which it is expected to succeed.
        safe_high: the upper end; 0 where there are none.
        own_means: whether the difference of the two values' own means is expected to arrive here, at any
            scale.
        elsewhere: the site where that is likeliest to succeed, if it is expected to; its probability there.
    """

    probability: float
    off_relative: float = math.nan
    turn: float = math.nan
    safe_low: float = math.nan
    safe_high: float = math.nan
    own_means: bool = False
    elsewhere: tuple[str, float] | None = None


def advise(facts: Facts) -> tuple[str, str]:
    """Return the advice and its reason, by the rules of this module."""
    arrives = facts.probability >= EVEN
    somewhere = arrives or facts.safe_high > 0
    if not somewhere and not facts.own_means:
        return _elsewhere(facts)
    off = f"it would end off the manifold, by {facts.off_relative:.2g} times its noise"
    if arrives and not facts.off_relative > NOISE:
        end = (
            "where no manifold is known" if math.isnan(facts.off_relative) else "on the manifold to its noise"
        )
        return LINEAR, f"expected to arrive ({facts.probability:.0%}), {end}"
    if facts.off_relative > NOISE:
        if facts.turn <= RADIAN:
            return (
                TANGENT,
                f"{off}; over the vector that turns by {facts.turn:.2g} rad, which one step follows",
            )
        if math.isnan(facts.turn):
            return GEODESIC, f"{off}, whose curvature is not known"
        return GEODESIC, f"{off}, which turns by {facts.turn:.2g} rad over the vector"
    if facts.safe_high > 0:
        return LINEAR, f"expected to arrive at scales from {facts.safe_low:.2g} to {facts.safe_high:.2g}"
    return LINEAR, "with the difference of the two values' own means, which is expected to arrive"


def _elsewhere(facts: Facts) -> tuple[str, str]:
    here = f"not expected to arrive here ({facts.probability:.0%})"
    if facts.elsewhere is None:
        return ELSEWHERE, f"{here}, nor at any of the sites that were looked at"
    name, chance = facts.elsewhere
    return f"{ELSEWHERE}: {name}", f"{here}; there with {chance:.0%}"


def known_facts(
    rows: pd.DataFrame, own: pd.DataFrame, others: pd.DataFrame, geometry: Mapping[str, Any]
) -> Facts:
    """Put together what a diagnosis knows of some edits at one site: the medians, and the mean probability.

    Args:
        rows: the edits, from the diagnosis's table.
        own: the differences of the own means of the same values at this site.
        others: the same at other sites.
        geometry: of the site.
    """
    curvature = geometry.get("curvature")
    bends = bool(geometry.get("reliable")) and curvature is not None
    chances = others.groupby("site", sort=False)["probability"].mean() if len(others) else None
    best = None
    if chances is not None and float(chances.max()) >= EVEN:
        place = chances[chances >= chances.max() - 1e-9].index[-1]
        best = str(place), float(chances[place])
    return Facts(
        probability=float(rows["probability"].mean()),
        off_relative=_median(rows, "off_relative"),
        turn=float(curvature or 0.0) * _median(rows, "norm") if bends else math.nan,
        safe_low=_median(rows, "safe_low"),
        safe_high=_median(rows, "safe_scale"),
        own_means=len(own) > 0
        and (float(own["probability"].mean()) >= EVEN or _median(own, "safe_scale") > 0),
        elsewhere=best,
    )


def site_advice(sites: Sequence[SiteSummary], table: pd.DataFrame) -> tuple[SiteSummary, ...]:
    """Write into each site's geometry its safe scales (the medians of each kind of edit) and the advice.

    The advice of a site is that for the mean differences of all pairs of values together, at the likeliest
    of the scales that were judged; where that for reused vectors is another one, the reason says so.
    """
    found = []
    differences = table[table["edit"] == MEAN_DIFFERENCE]
    for site in sites:
        here = table[table["site"] == site.label]
        own, others = (differences[(differences["site"] == site.label) == same] for same in (True, False))
        kinds = {str(kind): rows for kind, rows in here.groupby("edit", sort=False)}
        said = {
            kind: advise(known_facts(_likeliest(rows), own, others, site.geometry))
            for kind, rows in kinds.items()
        }
        advice, reason = said.get(MEAN_DIFFERENCE) or next(iter(said.values()))
        for kind, (word, why) in said.items():
            if word != advice:
                reason += f"; for {kind}s {word}: {why}"
        # Scales of one direction: those of the vector turned round are no part of the same stretch.
        scales = {
            name: {kind: _or_none(_median(_forward(rows), column)) for kind, rows in kinds.items()}
            for name, column in (("safe_scale", "safe_scale"), ("safe_low", "safe_low"))
        }
        geometry = {**site.geometry, **scales, "advice": advice, "advice_reason": reason}
        found.append(replace(site, geometry=geometry))
    return tuple(found)


def _likeliest(rows: pd.DataFrame) -> pd.DataFrame:
    """The edits of the scale at which most are expected to arrive."""
    return rows[rows["scale"] == rows.groupby("scale", sort=False)["probability"].mean().idxmax()]


def _forward(rows: pd.DataFrame) -> pd.DataFrame:
    """The edits along their vectors; where there are none, those against them."""
    ahead = rows[rows["scale"] > 0]
    return ahead if len(ahead) else rows


def _median(rows: pd.DataFrame, column: str) -> float:
    """The median of what is known of a column; NaN where nothing is."""
    if column not in rows or not rows[column].notna().any():
        return math.nan
    return float(np.nanmedian(rows[column].to_numpy(dtype=float)))


def _or_none(number: float) -> float | None:
    return round(number, 4) if math.isfinite(number) else None
