"""What an edit along a manifold costs: a forward pass with a TangentSteer against the unedited pass.

Run with ``python -m experiments.benchmarks.manifold_edits``. The manifold is a PointCloud of samples of a
sheet that goes through the states that the batch has at the site, so that every state has a foot among
them; the edit moves each by a part of the way to the next. The ratio is that of the other benchmarks, the
peer's time over ours: 0.5 means that an edited pass takes twice as long as an unedited one. `overhead` is
its inverse.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.benchmarks.timing import compare
from geoedit import Site, testbeds
from geoedit.edits import Edit, LinearSteer, TangentSteer
from geoedit.hooks import intercept
from manifolds import PointCloud

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The batch, the manifold's samples, the tokens of the larger model's prompts, and how it is run."""

    batch: int = 32
    samples: int = 10_000
    tokens: int = 8
    scale: float = 0.2
    rounds: int = 7
    device: str = "cpu"
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time edited passes of both models against unedited ones; a LinearSteer shows what the hook costs."""
    settings = settings or Settings()
    site = Site(2, "residual_out", "last")
    rows = []
    for name, (model, inputs) in models(settings).items():
        states = read(model, site, inputs)
        cloud = PointCloud.fit(sheet(states, settings), dim=2)
        direction = states[1] - states[0]
        edits: dict[str, LinearSteer | TangentSteer] = {
            "LinearSteer": LinearSteer(site, direction, scale=settings.scale),
            "TangentSteer": TangentSteer(site, cloud, direction, scale=settings.scale),
        }
        for kind, edit in edits.items():
            timing = compare(
                forward(model, inputs, edit), forward(model, inputs, None), rounds=settings.rounds
            )
            along = kind == "TangentSteer"
            samples = f" on a PointCloud of {settings.samples} samples" if along else ""
            rows.append(
                {
                    "work": f"forward pass of {name}, batch {settings.batch}, with a {kind}{samples}",
                    "peer": "the unedited pass",
                    "aim": 0.5 if along else None,
                    **timing.row(),
                    "overhead": round(1 / timing.ratio, 4),
                    "edit_bytes": edit.nbytes if isinstance(edit, TangentSteer) else None,
                    "inside": float(cloud.project(states).inside.float().mean()),
                }
            )
    return rows


def models(settings: Settings) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """The almanac on its own prompts, and a random-weight GPT-2 in the shape of the smallest."""
    model: Any
    model, tokenizer, world = testbeds.load("almanac-gpt2")
    texts = [prompt.text for prompt in world.concepts["months"].prompts()[: settings.batch]]
    almanac = dict(tokenizer(texts, return_tensors="pt", padding=True).to(settings.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        small: Any = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(50_000, (settings.batch, settings.tokens), generator=generator).to(settings.device)
    random = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "the almanac": (model.to(settings.device), almanac),
        "GPT-2 small's shape": (small.to(settings.device), random),
    }


def read(model: nn.Module, site: Site, inputs: dict[str, Tensor]) -> Float[Tensor, "batch width"]:
    """The states of a batch at a site."""
    kept: list[Tensor] = []

    def keep(states: Tensor, selected: Tensor, this_pass: object) -> None:
        kept.append(states[selected])

    with torch.no_grad(), intercept(model, site, keep):
        model(**inputs)
    return kept[0]


def sheet(states: Float[Tensor, "batch width"], settings: Settings) -> Float[Tensor, "samples width"]:
    """Samples of a smooth sheet through the states, with noise of a hundredth of their spread.

    The states stand on a square grid, and Gaussian kernels go through them.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    line = torch.arange(math.ceil(len(states) ** 0.5), dtype=torch.float64, device=states.device)
    grid = torch.cartesian_prod(line, line)[: len(states)]
    wide = states.double() - states.double().mean(0)

    def kernel(x: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, grid).square() / (2 * 1.2**2))

    weights = torch.linalg.solve(
        kernel(grid) + 1e-9 * torch.eye(len(grid), dtype=grid.dtype, device=grid.device), wide
    )
    place = torch.rand(settings.samples, 2, generator=generator, dtype=torch.float64).to(grid)
    low, high = grid.amin(0), grid.amax(0)
    points = kernel(low + place * (high - low)) @ weights
    spread = wide.square().mean().sqrt()
    noise = torch.randn(points.shape, generator=generator, dtype=points.dtype).to(points)
    return (points + 0.01 * spread * noise + states.double().mean(0)).to(states.dtype)


def forward(model: nn.Module, inputs: dict[str, Tensor], edit: Edit | None) -> Callable[[], object]:
    """A function that runs one pass; of a copy of the model, if an edit is attached to it."""
    if edit is not None:
        model = copy.deepcopy(model)
        edit.attach(model)

    @torch.no_grad()
    def work() -> object:
        return model(**inputs).logits

    return work


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    log.info(json.dumps(run(), indent=1))
