"""Every benchmark, or those that are named: ``python -m experiments.benchmarks [NAME ...]``.

One thread; the rows go to docs/results/benchmarks.json and, as a table, to benchmarks.md. A benchmark that is
not named keeps the rows of its last run.
"""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.curvature_table import curvature_table
from geoedit.diagnosis.result import write_text

log = logging.getLogger(__name__)
RESULTS = Path(__file__).parents[2] / "docs" / "results"
NAMES = (
    "adam_on_stiefel",
    "transport_of_fixed_rank",
    "matrix_completion",
    "many_problems",
    "pullback_geodesic",
    "jacobian_directions",
    "lora_almanac",
    "curvature_estimators",
    "manifold_edits",
    "update_spectra",
    "intruder_scan",
    "update_merging",
    "streamed_checkpoints",
    "slider_training",
    "slider_inference",
    "slider_gpu",
    "growth",
)
PACKAGES = (
    "torch",
    "geoopt",
    "pymanopt",
    "stochman",
    "scikit-dimension",
    "diffusers",
    "peft",
    "weightwatcher",
    "safetensors",
    "numpy",
    "scipy",
)


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all of them, and write what they found."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise SystemExit(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    torch.set_num_threads(1)
    path = RESULTS / "benchmarks.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in names or NAMES:
        log.info("%s", name)
        module = importlib.import_module(f"experiments.benchmarks.{name}")
        found[name] = {"machine": machine(), "result": module.run()}
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1, default=float) + "\n")
        write_text(RESULTS / "benchmarks.md", page(found))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    versions = {name: metadata.version(name).split("+")[0] for name in PACKAGES if installed(name)}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "device": device, "processor": platform.machine(), "versions": versions}


def installed(name: str) -> bool:
    """Whether a distribution is there."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def page(found: dict[str, Any]) -> str:
    """The comparisons, the errors of curvature and the growth as Markdown tables."""
    rows = [
        row
        for name in NAMES
        if name in found and isinstance(found[name]["result"], list)
        for row in found[name]["result"]
        if "ratio" in row
    ]
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m experiments.benchmarks`. Ratio: the peer's time over ours, both taken in turn",
        "in one run on one thread; above 1, ours is faster. For LoRA: steps to one loss. For an edit: the",
        "unedited pass over the edited one; at 0.5 the edit makes the pass take twice as long.",
        "The range is the quartiles over the rounds, or the extremes where there were few.",
        "",
        "| work | peer | ours, ms | peer, ms | ratio (range) | aim |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        aim = row.get("aim")
        met = "" if aim is None else f"{aim:g}, {'met' if row['ratio'] >= aim else '**missed**'}"
        lines.append(
            f"| {row['work']} | {row['peer']} | {short(row['ours_ms'])} | {short(row['peer_ms'])} "
            f"| {row['ratio']:.3g} ({row['low']:.3g}–{row['high']:.3g}) | {met} |"
        )
    if "curvature_estimators" in found:
        lines += ["", *curvature_table(found["curvature_estimators"]["result"])]
    if "growth" in found:
        lines += ["", *growth_table(found["growth"]["result"])]
    about = {json.dumps(found[name]["machine"], sort_keys=True) for name in found}
    lines += ["", "## Taken on", ""]
    for one in sorted(about):
        facts = json.loads(one)
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines.append(f"- {facts['date']}, {facts['device']}, {facts['processor']}: {versions}")
    return "\n".join(lines) + "\n"


def short(number: float) -> str:
    """A number with three digits, or all digits before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def growth_table(rows: list[dict[str, Any]]) -> list[str]:
    """The exponents, and the share of memory bandwidth at the largest size."""
    lines = [
        "## Growth",
        "",
        "Exponent of the time against each size, the others kept at 8×(1024×16) in float32, and the share of",
        "the memory bandwidth of a large copy at the largest size, counting each tensor once.",
        "",
        "| operation | batch | rows | rank | largest | GB/s | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "largest" not in row:
            lines.append(f"| {row['operation']} | | | | | {row['gigabytes_per_second']} | 1 |")
            continue
        exponents = " | ".join(str(row[f"exponent_{name}"]) for name in ("batch", "rows", "rank"))
        share = f"{row['gigabytes_per_second']} | {row['share_of_bandwidth']:.0%}"
        lines.append(f"| {row['operation']} | {exponents} | {row['largest']} | {share} |")
    return lines


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
