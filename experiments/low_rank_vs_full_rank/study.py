"""The study from training to its page; what is there already is not made again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import safe_open

from experiments.low_rank_vs_full_rank.facts import FAMILIES
from experiments.low_rank_vs_full_rank.figures import draw
from experiments.low_rank_vs_full_rank.measure import EPSILON, PATH, TOP, difference, judge_run, read_run
from experiments.low_rank_vs_full_rank.page import page
from experiments.low_rank_vs_full_rank.settings import Settings
from experiments.low_rank_vs_full_rank.summary import agreement, matched, summary
from experiments.low_rank_vs_full_rank.train import folder_of, train_all
from geoedit import testbeds
from geoedit.diagnosis.result import write_text
from peft_analysis.base_svd import SVDCache
from peft_analysis.compare import compare
from peft_analysis.updates import Weights

log = logging.getLogger(__name__)
NAME = "low_rank_vs_full_rank"
LEFT_OUT = ("losses", "matrices")  # of a run, in the results' file
COMPARED = (
    "cosine_chance", "overlap_left", "overlap_right", "overlap_chance_left", "overlap_chance_right",
)  # fmt: skip


def run(settings: Settings) -> dict[str, Any]:
    """Train, read, summarise, and write the results, figures and page to `settings.folder`."""
    records = train_all(settings)
    runs = read_all(records, settings)
    found: dict[str, Any] = {
        "settings": {
            "models": list(settings.models),
            "steps": settings.steps,
            "batch": settings.batch,
            "alpha_over_rank": settings.alpha,
            "seeds": list(settings.seeds),
            "known": {"families": list(FAMILIES), "sentences": settings.known},
            "rates": {method.name: list(method.rates) for method in settings.methods},
            "epsilon": EPSILON,
            "top": TOP,
            "path": list(PATH),
        },
        "summary": summary(runs),
        "matched": matched(runs),
        "agreement": agreement(runs),
        "runs": [{key: value for key, value in one.items() if key not in LEFT_OUT} for one in runs],
    }
    settings.folder.mkdir(parents=True, exist_ok=True)
    write_text(settings.folder / f"{NAME}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    figures = draw(found, settings.folder, NAME)
    write_text(settings.folder / f"{NAME}.md", page(found, [path.name for path in figures]))
    return found


def read_all(records: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """The records with what was read from the weights of each run, kept in a file beside them."""
    found = []
    for name in settings.models:
        model, _, _ = testbeds.load(name)
        base, cache = Weights.of_module(model), SVDCache()
        own = [record for record in records if record["model"] == name]
        names = trained_by_all([folder_of(record, settings) for record in own], base)[: settings.matrices]
        for record in own:
            found.append(record | _read(record, own, base, names, cache, settings))
    return found


def trained_by_all(folders: Sequence[Path], base: Weights) -> list[str]:
    """The matrices that every run changed, in the base's order."""
    common: set[str] | None = None
    for folder in folders:
        with safe_open(folder / "tuned.safetensors", framework="pt") as file:
            keys = set(file.keys())
        common = keys if common is None else common & keys
    return [name for name in base if name in (common or ()) and len(base.shape(name)) >= 2]


def _read(
    record: dict[str, Any],
    own: Sequence[dict[str, Any]],
    base: Weights,
    names: list[str],
    cache: SVDCache,
    settings: Settings,
) -> dict[str, Any]:
    """What one run changed, how it compares with full fine-tuning on the same facts, and the verdicts."""
    folder = folder_of(record, settings)
    found = _kept(folder / "read.json", names, lambda: read_run(base, folder, names, cache))
    full = next((r for r in own if r["kind"] == "full" and r["seed"] == record["seed"] and r["chosen"]), None)
    if record["chosen"] and full is not None and full["method"] != record["method"]:
        other = folder_of(full, settings)
        found |= _kept(folder / "like_full.json", names, lambda: like_full(base, folder, other, names))
    if record["chosen"] and record["seed"] in settings.seeds[: settings.judged]:
        found |= _kept(
            folder / "verdicts.json",
            names,
            lambda: judge_run(base, folder, names, whole=settings.matrices is None),
        )
    return found


def like_full(base: Weights, folder: Path, full: Path, names: list[str]) -> dict[str, Any]:
    """How a run's update compares with that of full fine-tuning on the same facts."""
    seen = compare(*(difference(base, one, "float32", names) for one in (folder, full)))
    rows = list(seen.rows.values())
    means = {key: fmean(getattr(row, key) for row in rows) for key in COMPARED}
    return {"like_full": {"cosine": seen.cosine, **means}}


def _kept(path: Path, names: list[str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file beside a run holds for these matrices, made now if it is not there."""
    about = {"names": names, "path": list(PATH), "epsilon": EPSILON, "top": TOP}
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["about"] == about:
            return dict(kept["found"])
    started = time.perf_counter()
    found = make()
    log.info("%s in %.0f s", path, time.perf_counter() - started)
    write_text(path, json.dumps({"about": about, "found": found}, default=float) + "\n")
    return found
