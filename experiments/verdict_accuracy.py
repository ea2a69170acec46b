"""Updates whose making is known, and how often the verdict says so. `python -m experiments.verdict_accuracy`.

Every case is a small model of several matrices that is changed in one way, rounded to a dtype, and read back
as a pair of checkpoints: LoRA merged, full fine-tuning with a falling spectrum, ReLoRA merged stage by stage,
rank-one edits, nothing, and rounding alone.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.diagnosis.result import write_text
from peft_analysis.updates import Weights, WeightUpdate
from peft_analysis.verdict import verdict

log = logging.getLogger(__name__)
RESULTS = Path(__file__).parents[1] / "docs" / "results"
NAME = "verdict_accuracy"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRUTHS = {
    "merged LoRA": "low rank",
    "full fine-tune": "full rank",
    "ReLoRA": "low rank",
    "edit": "low rank",
    "none": "none",
}


@dataclass(frozen=True)
class Case:
    """One simulated update.

    Attributes:
        origin: the truth.
        rank: of the LoRA, of each ReLoRA stage, of the edit.
        shape: of its matrices (out, in).
        stored: the dtype of the tuned weights. base: that of the base.
        norm: of the update, relative to the base's.
        stages: of ReLoRA.
        exponent: of the fine-tune's falling spectrum.
        seed: of everything drawn.
    """

    origin: str
    rank: int = 8
    shape: tuple[int, int] = (128, 128)
    stored: str = "bfloat16"
    base: str = "bfloat16"
    norm: float = 1e-2
    stages: int = 1
    exponent: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """The grid.

    Attributes:
        shapes: of the matrices; ranks above a quarter of the smaller side are left out.
        ranks: of LoRA. norms: of the update relative to the base. exponents: of fine-tunes.
        stages: of ReLoRA, with the rank of each.
        dtypes: of the tuned weights and of the base.
        blocks: of the simulated model, each with two matrices and a vector.
        seeds: fresh ones for each measurement.
        folder: where the table goes.
    """

    shapes: tuple[tuple[int, int], ...] = ((96, 256), (288, 256))
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    norms: tuple[float, ...] = (3e-2, 1e-2, 3e-3, 1e-3)
    exponents: tuple[float, ...] = (0.5, 1.0)
    stages: tuple[tuple[int, int], ...] = ((3, 4), (2, 8), (4, 16))
    blocks: int = 3
    dtypes: tuple[tuple[str, str], ...] = (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
        ("float16", "float32"),
    )
    seeds: tuple[int, ...] = (2026,)
    folder: Path = RESULTS

    @classmethod
    def small(cls, folder: Path = RESULTS) -> Settings:
        """A slice of a few seconds."""
        return replace(
            cls(),
            shapes=((72, 96),),
            ranks=(1, 8),
            norms=(1e-2,),
            exponents=(0.7,),
            stages=((3, 4),),
            dtypes=(("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")),
            blocks=2,
            folder=folder,
        )


def cases(settings: Settings) -> Iterator[Case]:
    """Every case of the grid."""
    grid = itertools.product(settings.seeds, settings.shapes, settings.dtypes)
    for seed, shape, (stored, base) in grid:
        one = partial(Case, shape=shape, stored=stored, base=base, seed=seed)
        yield one("none")
        for norm in settings.norms:
            for rank in settings.ranks:
                if 4 * rank <= min(shape):
                    yield one("merged LoRA", rank=rank, norm=norm)
            for exponent in settings.exponents:
                yield one("full fine-tune", exponent=exponent, norm=norm)
            yield one("edit", rank=1, norm=norm)
        for stages, rank in settings.stages:
            if 4 * rank * stages <= min(shape):
                for norm in settings.norms[:2]:
                    yield one("ReLoRA", rank=rank, stages=stages, norm=norm)


def made(case: Case, blocks: int) -> WeightUpdate:
    """Simulate a case: the differences of the tuned and the base checkpoint, as they would be read."""
    digest = hashlib.sha256(repr(case).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    stored, kept = DTYPES[case.stored], DTYPES[case.base]
    base: dict[str, Tensor] = {}
    tuned: dict[str, Tensor] = {}
    edited = int(torch.randint(blocks, (), generator=generator))
    for block in range(blocks):
        for part in ("attention", "mlp"):
            name = f"blocks.{block}.{part}.weight"
            weight = matrix(case.shape, generator).to(kept)
            touched = case.origin != "edit" or (block == edited and part == "mlp")
            base[name] = weight
            tuned[name] = change(weight, case, generator) if touched else weight.to(stored)
        name = f"blocks.{block}.norm.weight"
        base[name] = torch.ones(case.shape[1], dtype=kept)
        moved = 0.0 if case.origin != "full fine-tune" else 1e-2
        tuned[name] = (base[name] + moved * torch.randn(case.shape[1], generator=generator)).to(stored)
    weights = Weights(
        {name: value.clone for name, value in base.items()},
        shapes={name: value.shape for name, value in base.items()},
        dtypes={name: value.dtype for name, value in base.items()},
        source="a simulated base",
    )
    differences = {name: tuned[name].float() - base[name].float() for name in base}
    return WeightUpdate.from_tensors(differences, base=weights, rounded=stored, base_rounded=kept)


def matrix(shape: tuple[int, int], generator: torch.Generator) -> Float[Tensor, "m n"]:
    """A base: rows and columns of unequal size, some strong directions, noise."""
    m, n = shape
    rows, columns = (torch.exp(0.3 * torch.randn(size, generator=generator)) for size in shape)
    noise = torch.randn(m, n, generator=generator) * rows[:, None] * columns
    k = max(min(shape) // 8, 1)
    strong = torch.randn(m, k, generator=generator) @ torch.randn(k, n, generator=generator)
    return (noise + 0.5 * strong / math.sqrt(k)) / math.sqrt(n)


def low_rank(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Float[Tensor, "m n"]:
    """B A with Gaussian factors of columns that differ in size."""
    left = torch.randn(shape[0], rank, generator=generator)
    left = left * torch.exp(0.4 * torch.randn(rank, generator=generator))
    return left @ torch.randn(rank, shape[1], generator=generator)


def falling(shape: tuple[int, int], exponent: float, generator: torch.Generator) -> Float[Tensor, "m n"]:
    """Random directions with singular values k^−exponent, to the last."""
    size = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, size, generator=generator))[0] for side in shape)
    return left * torch.arange(1, size + 1).float().pow(-exponent) @ right.mT


def change(weight: Tensor, case: Case, generator: torch.Generator) -> Tensor:
    """The tuned values of one matrix, in the dtype they are stored in."""
    stored, shape = DTYPES[case.stored], case.shape
    if case.origin == "none":
        return weight.to(stored)

    def scaled(update: Tensor, norm: float) -> Tensor:
        return update * (norm * weight.float().norm() / update.norm())

    if case.origin == "full fine-tune":
        return (weight.float() + scaled(falling(shape, case.exponent, generator), case.norm)).to(stored)
    tuned = weight if case.stages == 1 else weight.to(stored)  # a run of merges begins with a loaded model
    for _ in range(case.stages):
        update = scaled(low_rank(shape, case.rank, generator), case.norm / math.sqrt(case.stages))
        tuned = (tuned.float() + update).to(stored)
    return tuned


def judged(case: Case, blocks: int) -> dict[str, Any]:
    """What the verdict says of a case, matrix by matrix and as a whole."""
    started = time.perf_counter()
    update = made(case, blocks)
    found = verdict(update, generator=torch.Generator().manual_seed(case.seed))
    touched = [
        one
        for name, one in found.matrices.items()
        if case.origin != "edit" or (bool(update[name].norm() > 0) and one.statement != "none")
    ]
    truth = TRUTHS[case.origin]
    return {
        **asdict(case),
        "statement": found.statement,
        "found": found.origin,
        "found_rank": found.rank,
        "found_stages": found.stages,
        "p_value": found.p_value,
        "matrices": len(touched),
        "matrices_right": sum(one.statement == truth for one in touched),
        "matrices_unknown": sum(one.statement == "unknown" for one in touched),
        "seconds": round(time.perf_counter() - started, 2),
    }


def right(row: dict[str, Any]) -> bool:
    """Whether statement and origin are the truth."""
    return bool(row["statement"] == TRUTHS[row["origin"]] and row["found"] == row["origin"])


def run(
    settings: Settings | None = None,
    *,
    rows: list[dict[str, Any]] | None = None,
    every: int = 1,
    first: int = 1,
) -> dict[str, Any]:
    """Judge the cases, write JSON and page; return what is in the JSON.

    Args:
        settings: the grid.
        rows: of cases that have been judged; judged now if not given.
        every: of so many neighbours in the grid …
        first: … the first so many are judged.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    chosen = [case for number, case in enumerate(cases(settings)) if number % every < first]
    if rows is None:
        rows = []
        for case in chosen:
            rows.append(judged(case, settings.blocks))
            if not right(rows[-1]):
                log.info("%s", rows[-1])
    found = {
        "settings": {**asdict(settings), "folder": settings.folder.name, "every": every, "first": first},
        "seconds": round(time.perf_counter() - started + sum(row["seconds"] for row in rows)),
        "rows": rows,
    }
    text = json.dumps(plain(found), separators=(",", ":"), allow_nan=False)
    write_text(settings.folder / f"{NAME}.json", text + "\n")
    write_text(settings.folder / f"{NAME}.md", page(rows, settings, share=(first, every)))
    return found


def plain(value: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tally(rows: list[dict[str, Any]]) -> str:
    """Right, unknown and wrong, as cells of a table: whole updates, then single matrices."""
    matrices = sum(row["matrices"] for row in rows)
    sure = sum(row["matrices_right"] for row in rows)
    hidden = sum(row["matrices_unknown"] for row in rows)
    yes = sum(map(right, rows))
    unknown = sum(row["statement"] == "unknown" for row in rows)
    return " | ".join(
        map(str, (len(rows), yes, unknown, len(rows) - yes - unknown, sure, hidden, matrices - sure - hidden))
    )


def page(rows: list[dict[str, Any]], settings: Settings, *, share: tuple[int, int] = (1, 1)) -> str:
    """The table of the documentation; `share` of the grid was judged."""
    norms = sorted({row["norm"] for row in rows}, reverse=True)
    options = f" --every {share[1]} --first {share[0]}" if share[0] < share[1] else ""
    lines = [
        "# How often a verdict is right",
        "",
        "Simulated updates whose making is known, read back as a pair of checkpoints, on seeds that nothing",
        f"was tuned on ({', '.join(map(str, settings.seeds))}). Each has {2 * settings.blocks} matrices of "
        f"one shape ({', '.join(f'{m} × {n}' for m, n in settings.shapes)}). Dtypes: float32, bfloat16,",
        "float16, on a base of the same dtype or of float32. LoRA ranks "
        f"{', '.join(map(str, settings.ranks))} up to a quarter of the smaller side.",
        "",
        *(
            [f"Of every {share[1]} neighbours in this grid {share[0]} were judged.", ""]
            if share[0] < share[1]
            else []
        ),
        "An update is *right* when both its statement and its origin are. *Unknown* is what a verdict says",
        "where the noise hides the answer. A matrix counts by its statement alone.",
        "",
        "| | updates | right | unknown | wrong | matrices right | unknown | wrong |",
        "|---|---|---|---|---|---|---|---|",
        f"| all | {tally(rows)} |",
    ]
    visible = [row for row in rows if row["norm"] >= VISIBLE or row["stored"] == "float32"]
    lines.append(f"| norm {VISIBLE:g} of the base's or more, or float32 | {tally(visible)} |")
    for origin in TRUTHS:
        lines.append(f"| {origin} | {tally([row for row in rows if row['origin'] == origin])} |")
    for norm in norms:
        lines.append(
            f"| norm {norm:g} of the base's | {tally([row for row in rows if row['norm'] == norm])} |"
        )
    for stored, base in dict.fromkeys((row["stored"], row["base"]) for row in rows):
        chosen = [row for row in rows if (row["stored"], row["base"]) == (stored, base)]
        lines.append(f"| {stored} on {base} | {tally(chosen)} |")
    wrong = [row for row in rows if not right(row)]
    lines += ["", "## What was not right", "", *(_told(row) for row in wrong[:40])] if wrong else []
    lines += ["", "## Again", "", "```bash", f"python -m experiments.verdict_accuracy{options}", "```"]
    return "\n".join(lines) + "\n"


VISIBLE = 1e-2


def _told(row: dict[str, Any]) -> str:
    made_of = f"rank {row['rank']}" if row["exponent"] == 0 else f"exponent {row['exponent']:g}"
    m, n = row["shape"]
    return (
        f"- {row['origin']}, {made_of}, {m} × {n}, norm {row['norm']:g}, {row['stored']} on {row['base']}: "
        f"{row['statement']}, {row['found']}"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=None, help="where the table goes")
    parser.add_argument("--small", action="store_true", help="a slice of a few seconds")
    parser.add_argument("--every", type=int, default=1, help="of so many neighbours in the grid …")
    parser.add_argument("--first", type=int, default=1, help="… the first so many are judged")
    given = parser.parse_args()
    grid = Settings.small(Path("verdict-out")) if given.small else Settings()
    run(replace(grid, folder=given.folder or grid.folder), every=given.every, first=given.first)
