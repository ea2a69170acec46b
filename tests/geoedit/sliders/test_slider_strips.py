"""Strips against the pipeline's own images, and what they look like as files."""

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from geoedit.errors import EditError
from geoedit.sliders import strip
from tests.geoedit.sliders.slider_cases import random_slider


def test_a_strip_has_the_pipelines_own_images(tiny_sd1: Any, tmp_path: Any) -> None:
    slider = random_slider(tiny_sd1, "unet", "text_encoder", size=0.05)
    row = strip(tiny_sd1, slider, [-1, 0, 1.5], prompt="a red bar", seed=3, steps=2, batch_size=2)
    assert (row.scales, row.prompt, row.seed) == ((-1.0, 0.0, 1.5), "a red bar", 3)
    for scale, image in zip(row.scales, row.images, strict=True):
        generator = torch.Generator().manual_seed(3)
        with slider.at(tiny_sd1, scale):
            drawn = tiny_sd1("a red bar", generator=generator, num_inference_steps=2, output_type="np")
        assert np.allclose(image.permute(1, 2, 0), drawn.images[0], atol=1e-5)
    assert float((row.images[0] - row.images[2]).abs().max()) > 0.01
    row.save(tmp_path / "row.png")
    shown = Image.open(tmp_path / "row.png")
    assert shown.size == Image.open(io.BytesIO(row._repr_png_())).size
    assert shown.width > 3 * 96  # 16 pixels a side are shown enlarged
    first = np.asarray(shown)[4 : 4 + 96, 4 : 4 + 96].reshape(16, 6, 16, 6, 3)
    assert (first == first[:, :1, :, :1]).all()
    assert np.abs(first[:, 0, :, 0] / 255 - row.images[0].permute(1, 2, 0).numpy()).max() < 0.5 / 255 + 1e-6
    with pytest.raises(EditError, match=r"\.png"):
        row.save(tmp_path / "row.jpg")


def test_the_prompt_is_what_the_slider_was_taught_on(tiny_sd1: Any) -> None:
    slider = random_slider(tiny_sd1, "unet", among=lambda path: path.endswith("to_q"))
    with pytest.raises(EditError, match="give prompt="):
        strip(tiny_sd1, slider, [0.0], steps=1)
    spec = {"target": "a {hue} {} shape", "preserve": {"hue": ["red", "blue"]}}
    taught = dataclasses.replace(slider, details={"spec": spec})
    assert strip(tiny_sd1, taught, [0.0], steps=1).prompt == "a red shape"


def test_a_pipeline_without_prompts(tiny_unconditional: Any) -> None:
    slider = random_slider(tiny_unconditional, "unet", size=0.05)
    row = strip(tiny_unconditional, slider, torch.tensor([-1.0, 1.0]), steps=1)
    assert row.prompt is None
    assert row.images.shape == (2, 3, 8, 8)
    for scales, message in (([], "0 scales"), ([float("nan")], "finite")):
        with pytest.raises(EditError, match=message):
            strip(tiny_unconditional, slider, scales)
    with pytest.raises(EditError, match="draws no images"):
        strip(tiny_unconditional.unet, slider, [1.0])
