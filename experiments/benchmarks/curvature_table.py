"""The rows of `curvature_estimators` as a table, with what is won and what is lost in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLUMNS = {
    "mean_curvature_error": "error of \\|H\\|",
    "sectional_error": "error of K",
    "correlation": "correlation of K",
    "bend_error": "error of II(v, v)",
    "answered": "share answered",
    "sectional_off": "error of the median K",
}
K, R = "sectional_error", "correlation"
DIFFUSION = "diffusion geometry"
SMALLER_IS_BETTER = ("mean_curvature_error", "sectional_error", "bend_error")


def curvature_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: each shape and noise with every method's errors, the aims, and who wins where."""
    cases = grouped(rows)
    lines = [
        "## Curvature from samples",
        "",
        "Medians over the points asked for, of relative errors (absolute ones where the truth is zero), on",
        "draws that nothing was tuned on, in 128 dimensions turned at random. K: mean sectional curvature.",
        "Ours refuses where noise drowns the curvature; its errors are over the points that it answers for.",
        "Diffusion geometry gives K alone and sees the points in their leading principal directions only; of",
        "the large samples it sees those with most noise, for it takes most of the time.",
        "",
        "| shape | noise | k | method | answered | \\|H\\| | K | correlation of K | II(v, v) | aims |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (shape, noise), methods in cases.items():
        for row in methods:
            first = row["method"] == methods[0]["method"]
            place = f"{shape} | {noise:g} | {row['neighbors']}" if first else " | | "
            errors = [row["mean_curvature_error"], row["sectional_error"]]
            values = " | ".join(
                [
                    percent(row["answered"]),
                    *map(percent, errors),
                    "" if row["correlation"] is None else f"{row['correlation']:.3f}",
                    percent(row["bend_error"]),
                ]
            )
            aims = "; ".join(map(aim, row.get("aims", ())))
            lines.append(f"| {place} | {row['method']} | {values} | {aims} |")
    return [*lines, "", *verdict(cases), *speed(rows)]


def grouped(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The rows of each shape and noise, ours first."""
    cases: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if "shape" in row:
            cases.setdefault((row["shape"], row["noise"]), []).append(row)
    return cases


def aim(found: dict[str, Any]) -> str:
    """One aim with its outcome."""
    limit = found["limit"]
    bound = "at least" if found["column"] == "correlation" else "at most"
    wanted = f"{limit:g}" if isinstance(limit, float) else f"the {limit}'s"
    outcome = "met" if found["met"] else "**missed**"
    return f"{COLUMNS[found['column']]} {bound} {wanted}: {outcome}"


def verdict(cases: dict[tuple[str, float], list[dict[str, Any]]]) -> list[str]:
    """How often ours has the smaller error among the local fits, and where diffusion geometry is nearer."""
    compared = 0
    lost: list[str] = []
    refused: list[str] = []
    nearer: list[str] = []
    alone: list[str] = []
    for (shape, noise), (mine, *others) in cases.items():
        place = f"{shape}, noise {noise:g}"
        refused += [] if mine["answered"] else [place]
        for other in others:
            better = [column for column in SMALLER_IS_BETTER if beaten(mine, other, column)]
            if other["method"] != DIFFUSION:
                compared += sum(both(mine, other, column) for column in SMALLER_IS_BETTER)
                lost += [f"{place}, {COLUMNS[column]} ({other['method']})" for column in better]
                continue
            if mine["answered"] < 0.5:
                share = "no point" if not mine["answered"] else f"{mine['answered']:.0%} of the points"
                alone.append(f"{place} (ours answers for {share}; its error is {percent(other[K])})")
            elif better:
                nearer.append(f"{place} ({percent(other[K])} against {percent(mine[K])})")
            elif ahead(mine, other):
                nearer.append(f"{place} (correlation {other[R]:.3f} against {mine[R]:.3f})")
    won = compared - len(lost)
    text = [f"Among the local fits ours has the smaller error in {won} of {compared} comparisons."]
    if lost:
        text.append(f"It has the larger one on: {'; '.join(lost)}.")
    if refused:
        text.append(f"It answers nowhere on: {'; '.join(refused)}.")
    if any(row["method"] == DIFFUSION for methods in cases.values() for row in methods):
        where = f"on: {'; '.join(nearer)}" if nearer else "nowhere"
        text.append(f"Diffusion geometry is nearer to the truth than ours {where}.")
    if alone:
        text.append(f"It answers where ours refuses, on: {'; '.join(alone)}.")
    return [" ".join(text)]


def both(mine: dict[str, Any], other: dict[str, Any], column: str) -> bool:
    """Whether both give this quantity."""
    return mine[column] is not None and other[column] is not None


def beaten(mine: dict[str, Any], other: dict[str, Any], column: str) -> bool:
    """Whether the other's error is the smaller one."""
    return both(mine, other, column) and other[column] < mine[column]


def ahead(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the other's correlation is the larger one."""
    return both(mine, other, "correlation") and other["correlation"] > mine["correlation"]


def speed(rows: list[dict[str, Any]]) -> list[str]:
    """The time of one estimate."""
    lines = []
    for row in rows:
        if "milliseconds_a_point" in row:
            taken, wanted = row["milliseconds_a_point"], row["aim_ms"]
            outcome = "met" if taken <= wanted else "**missed**"
            lines.append(f"Time of {row['work']}: {taken:.3g} ms a point (aim {wanted:g} ms, {outcome}).")
    return ["", *lines] if lines else []


def percent(value: float | None) -> str:
    """A share as a percentage with two digits, or nothing."""
    if value is None:
        return ""
    hundredth = 100 * value
    if 0 < hundredth < 0.01:
        return "< 0.01 %"
    return f"{hundredth:.2g} %" if hundredth < 10 else f"{hundredth:.0f} %"
