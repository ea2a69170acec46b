"""A painter that draws the truth, and sliders by hand, for tests of measurement."""

import numpy as np
import torch

from geoedit.sliders import ModuleChange, Slider
from geoedit.sliders.bases import base_of
from geoedit.sliders.evaluation.drawing import Painter
from geoedit.testbeds.shapes import ATTRIBUTES, render
from manifolds import LowRank

NAMES = list(ATTRIBUTES)
KINDS = {"a bar": 1, "an ellipse": 0, "a diamond": 2}


def hand_made(pipe, name="size", size=1.0, seed=0, rank=2, **details):
    """A slider of random factors on the attention of a pipeline's denoiser."""
    base = base_of(pipe)
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for path, module in base.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and "attn" in path:
            out, into = module.weight.shape
            left = torch.randn(out, rank, generator=generator) * size / out**0.5
            right = torch.randn(rank, into, generator=generator) / into**0.5
            changes[path] = ModuleChange(LowRank(left, right))
    return Slider(name, {base.component: changes}, details=details)


class Drawn(Painter):
    """Takes the place of `Painter`: a slider moves rendered shapes by a rule that the test writes.

    `rule(label, scale)` gives the change of each attribute in natural standard deviations.
    """

    rule = None
    drawn = 0

    def __init__(self, base, sliders, how, *, cache=None, progress=None):
        self.base, self.sliders, self.how, self.progress = base, dict(sliders), how, progress

    def draw(self, rows):
        type(self).drawn += len(rows)
        parameters, kinds = zip(*map(self._shape, rows), strict=True)
        images = render(torch.tensor(np.stack(parameters)), torch.tensor(kinds))
        return (images * 255).round().to(torch.uint8)

    def _shape(self, row):
        generator = np.random.default_rng(row.seed)
        values = {name: (a.low + a.high) / 2 for name, a in ATTRIBUTES.items()}
        values["x"] += generator.uniform(-0.03, 0.03)
        values["brightness"] += generator.uniform(-0.05, 0.05)
        for label, scale in row.scales.items():
            for name, change in type(self).rule(label, scale).items():
                values[name] += change * ATTRIBUTES[name].natural_sd
        words = row.prompt.split()
        noun = next(text for text in KINDS if text.split()[-1] in words)
        for name, word, change in (("size", "large", 0.5), ("size", "small", -0.5)):
            if word in words:
                values[name] += change * ATTRIBUTES[name].natural_sd
        return [values[name] for name in NAMES], KINDS[noun]
