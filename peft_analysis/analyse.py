"""One call, one report: what an update changed, matrix by matrix."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from peft_analysis.base_svd import SVDCache
from peft_analysis.errors import UpdateError
from peft_analysis.report.measure import Settings, measure, verdict_of
from peft_analysis.report.processes import Processes
from peft_analysis.report.result import Report
from peft_analysis.report.resume import Kept
from peft_analysis.updates import WeightUpdate
from peft_analysis.updates.names import Selection
from peft_analysis.updates.read import read_update
from peft_analysis.verdict import verdict

PACKAGES = ("torch", "peft", "transformers", "safetensors", "numpy")


def analyse(
    base: Any,
    tuned: Any,
    *,
    only: Selection = None,
    without: Selection = None,
    max_base_side: int | None = 2048,
    top: int = 16,
    epsilon: float = 0.5,
    k: int = 10,
    seed: int = 0,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
    name: str | None = None,
) -> Report:
    """Read an update and say what it is: how large, of what rank, along what, with what intruders.

    Matrices are read, measured and let go one at a time. In a launch of several processes (`accelerate
    launch`, torchrun) they are shared, and every process returns the whole report.

    Args:
        base: what was tuned, as `read_update` takes it: a module, a folder, or None for an adapter alone;
            then everything relative to the base is NaN.
        tuned: an adapter, a module, a folder, a file, a `WeightUpdate`, or a sequence; see `read_update`.
        only: a regular expression that a parameter's name must contain, or the names themselves.
        without: the same for names that are left out.
        max_base_side: base matrices whose smaller side is above it are not decomposed, because that takes
            minutes: their angles, overlaps and intruders are left out, and the report says so. None for all,
            0 for none.
        top: how many of the base's strongest directions the update's are compared with.
        epsilon: a tuned direction is an intruder if its largest cosine with a base direction is below it.
        k: how many of the tuned matrix's strongest directions are looked at for intruders.
        seed: of every random draw.
        device: where to compute: "cuda" is the process's own; where the values are if None.
        cache: a folder that keeps the decompositions of base matrices for the next adapter.
        resume: a folder that keeps the row of each matrix: a stopped analysis goes on where it was. Rows of
            other values or settings are computed anew.
        progress: whether to show a bar, by bytes of matrices; None: on a terminal.
        name: what the page calls the update; the name of its file or folder if None.

    Raises:
        UpdateError: the update cannot be read (see `read_update`), does not fit the base, or holds NaN; an
            unknown name; a setting that no matrix could be measured with.

    Example:
        >>> from manifolds import LowRank
        >>> from peft_analysis import WeightUpdate
        >>> low = LowRank(torch.eye(8, 2), torch.eye(2, 6))
        >>> report = analyse(None, WeightUpdate.from_tensors({"model.layers.0.mlp.up_proj.weight": low}))
        >>> report.table[["block", "kind", "effective_rank"]].values.tolist()
        [[0, 'mlp.up_proj', 2.0]]
    """
    settings = Settings(max_base_side=max_base_side, top=top, epsilon=epsilon, k=k, seed=seed)
    update = read_update(base, tuned, only=only, without=without)
    chosen = update.matrices()
    processes = Processes.current()
    kept = None if resume is None else Kept(resume, settings.to_dict())
    where = _device(device)
    store = SVDCache(cache, memory=0)

    def row_of(name: str) -> dict[str, Any]:
        key = "" if kept is None else kept.key(update, name)
        row = None if kept is None else kept.read(name, key)
        if row is None:
            row = measure(update, name, settings, cache=store, device=where)
            if kept is not None:
                kept.write(name, key, row)
        return row

    def work() -> dict[str, dict[str, Any]]:
        mine = processes.share({name: _cost(update, name) for name in chosen})
        with _bar(update, mine, progress, processes) as bar:
            found = {}
            for name in mine:
                found[name] = row_of(name)
                bar.update(_bytes(update, name))
        return found

    parts = processes.gather(processes.together(work))
    rows = {name: row for part in parts for name, row in part.items()}
    told = processes.together(lambda: None if processes.rank else _whole(update, rows))
    overall, vectors = processes.gather(told)[0]
    return Report(
        name=name or (Path(tuned).name if isinstance(tuned, str | Path) else "") or "this update",
        source=update.source,
        base=None if update.base is None else update.base.source,
        rows=tuple(_without_values(rows[name]) for name in chosen),
        verdict=overall,
        vectors=tuple(vectors),
        left_out=_left_out([rows[name] for name in chosen]),
        notes=_notes(update),
        settings=settings.to_dict() | {"processes": processes.world, "device": str(where or "as stored")},
        versions=_versions(),
    )


def _device(device: torch.device | str | None) -> torch.device | None:
    """The device that is meant in this process: its own of several."""
    if device is None:
        return None
    found = torch.device(device)
    if found.type == "cpu" or found.index is not None:
        return found
    if Processes.current().world > 1:
        from accelerate import PartialState

        return torch.device(PartialState().device)
    return found


def _cost(update: WeightUpdate, name: str) -> float:
    """How much work a matrix is, roughly: what a decomposition of it takes."""
    shape = update.entries[name].shape
    m, n = shape[0], shape[1:].numel()
    return float(m) * n * min(m, n)


def _bytes(update: WeightUpdate, name: str) -> int:
    entry = update.entries[name]
    return entry.shape.numel() * (entry.rounded or entry.base_rounded or torch.float32).itemsize


def _bar(update: WeightUpdate, names: list[str], progress: bool | None, processes: Processes) -> Any:
    from tqdm.auto import tqdm

    hidden = None if progress is None else not progress
    return tqdm(
        total=sum(_bytes(update, name) for name in names),
        desc=f"{len(names)} matrices" + (f" of process {processes.rank}" if processes.world > 1 else ""),
        unit="B",
        unit_scale=True,
        disable=True if processes.rank else hidden,
    )


def _whole(
    update: WeightUpdate, rows: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The verdict on the whole update, and the changed parameters that are no matrices."""
    if not len(update):
        return None, []
    found = verdict(update, known={name: verdict_of(row) for name, row in rows.items()}).to_dict()
    del found["matrices"]
    return found, _vectors(update)


def _without_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what only the verdict on the whole needs."""
    judged = {key: value for key, value in row["judged"].items() if key != "singular_values"}
    return {**row, "judged": judged}


def _vectors(update: WeightUpdate) -> list[dict[str, Any]]:
    """Norms of the parameters that are no matrices, those that are zero left out."""
    matrices = set(update.matrices())
    found = []
    for name in update:
        if name in matrices:
            continue
        norm = float(torch.linalg.vector_norm(update.dense(name), dtype=torch.float64))
        if norm != norm or norm == float("inf"):
            raise UpdateError(f"{name} holds NaN or infinity; look at the checkpoint it was read from")
        if norm == 0:
            continue
        below = None
        if update.base is not None and name in update.base:
            below = float(torch.linalg.vector_norm(update.base[name], dtype=torch.float64))
        found.append({"parameter": name, "norm": norm, "relative_norm": norm / below if below else None})
    return found


WHAT = {
    "base": "Everything relative to the base (change, angles, overlap, intruders)",
    "base svd": "Angles, overlap and intruders",
}


def _left_out(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for what, why in row.get("left_out", {}).items():
            counts[WHAT[what], why] = counts.get((WHAT[what], why), 0) + 1
    return tuple({"what": what, "why": why, "matrices": count} for (what, why), count in counts.items())


def _notes(update: WeightUpdate) -> tuple[str, ...]:
    """What the files held beside the update, reason by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in update.skipped.items():
        reasons.setdefault(reason, []).append(name)
    found = []
    for reason, names in reasons.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        found.append(f"Not part of the update: {', '.join(names[:5])}{more} ({reason}).")
    return tuple(found)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
