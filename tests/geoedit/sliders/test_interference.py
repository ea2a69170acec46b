"""First-order interference, against the pipeline's own images and dense arithmetic."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from geoedit import EditError
from geoedit.algebra import Interference, interference, overlap
from geoedit.sliders import ModuleChange, Slider
from manifolds import LowRank


class Colours:
    """The mean of each colour."""

    natural_sd: Mapping[str, float] = {"red": 0.1, "green": 0.2}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"red": images[:, 0].mean((1, 2)), "green": images[:, 1].mean((1, 2))}


def slider(name: str, seed: int, pipe: Any, size: float = 0.3) -> Slider:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for path, module in pipe.unet.named_modules():
        if path.endswith(("attn2.to_v", "attn1.to_out.0")):
            rows, columns = module.weight.shape
            left, right = (torch.randn(*s, generator=generator) for s in ((rows, 2), (2, columns)))
            changes[path] = ModuleChange(LowRank(size * left, right / columns**0.5))
    return Slider(name, {"unet": changes})


def table(rows: Any, labels: str = "abc") -> pd.DataFrame:
    return pd.DataFrame(rows, list(labels), list("xyz"))


def test_effects_are_differences_of_the_pipelines_own_images(tiny_sd1: Any) -> None:
    sliders = [slider("red", 0, tiny_sd1), slider("green", 1, tiny_sd1)]
    prompts, seeds = ["a red bar", "a shape"], (0, 3)
    found = interference(
        tiny_sd1, sliders, prompts=prompts, seeds=seeds, step=0.4, measure=Colours(), steps=3, guidance=2.0
    )
    tiny_sd1.set_progress_bar_config(disable=True)
    for one in sliders:
        slopes = []
        for prompt in prompts:
            for seed in seeds:
                ends = []
                for scale in (0.4, -0.4):
                    with one.at(tiny_sd1, scale):
                        image = tiny_sd1(
                            prompt, num_inference_steps=3, guidance_scale=2.0, output_type="pt",
                            generator=torch.Generator().manual_seed(seed),
                        ).images  # fmt: skip
                    read = Colours()(torch.as_tensor(image))
                    ends.append([float(read["red"]) / 0.1, float(read["green"]) / 0.2])
                slopes.append((np.array(ends[0]) - np.array(ends[1])) / 0.8)
        expected = np.array(slopes)
        near = 0.05 / 255 / 0.1 / 0.8  # the mean of 256 roundings to 8 bits
        assert np.allclose(found.matrix.loc[one.name], expected.mean(0), atol=near)
        assert np.allclose(found.error.loc[one.name], expected.std(0, ddof=1) / 2, atol=near)
    assert found.own == {"red": "red", "green": "green"}
    assert np.allclose(np.diag(found.relative), 1)
    with pytest.raises(EditError, match="step"):
        interference(tiny_sd1, sliders, step=0.0)


def test_decoupled_sliders_move_one_attribute_each(tiny_sd1: Any) -> None:
    names = dict(zip("abc", (slider(n, s, tiny_sd1) for s, n in enumerate("abc")), strict=True))
    effects = np.array([[2.0, 0.5, 0.001], [-0.4, 1.0, 0.3], [0.0, 0.2, -1.5]])
    known = Interference(
        names, table(effects), table(np.full((3, 3), 0.01)), dict(zip("abc", "xyz", strict=True)), {}, 0.5
    )
    assert known.predict({"a": 1, "c": -2}).tolist() == pytest.approx([2, 0.1, 3.001])
    decoupled = known.decouple()
    flat = {
        n: torch.cat([c.matrix.dense().flatten() for _, _, c in s]).double()
        for n, s in {**names, **{f"{n}'": s for n, s in decoupled.items()}}.items()
    }
    basis = torch.stack([flat[n] for n in "abc"], 1)
    mix = torch.stack([torch.linalg.lstsq(basis, flat[f"{n}'"]).solution for n in "abc"])
    effects[0, 2] = 0.0  # within two standard errors
    assert np.allclose(mix.numpy() @ effects, np.diag(np.diag(effects)), atol=1e-5)

    alike = Interference(names, table(np.ones((3, 3))), table(np.zeros((3, 3))), known.own, {}, 0.5)
    with pytest.raises(EditError, match="nearly the same"):
        alike.decouple()
    with pytest.raises(EditError, match="attributes="):
        Interference(names, known.matrix, known.error, {"a": "x"}, {}, 0.5).decouple()


def test_overlaps_of_weights_are_cosines(tiny_sd1: Any, device: torch.device) -> None:
    a, b = (slider(n, s, tiny_sd1).to(device) for s, n in enumerate("ab"))
    found = overlap([a, b @ -2, a])
    one, other = (torch.cat([c.matrix.dense().flatten() for _, _, c in s]) for s in (a, b))
    cosine = float(torch.nn.functional.cosine_similarity(one, -other, dim=0))
    assert torch.allclose(found[0], found.new_tensor([1, cosine, 1]), atol=1e-5)
    assert overlap([a @ 0, b])[0].isnan().all()
