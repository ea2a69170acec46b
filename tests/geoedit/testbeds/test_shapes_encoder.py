"""Distances of features: against LPIPS's formula place by place, and what any distance must do."""

import math

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from geoedit.errors import EditError
from geoedit.testbeds.shapes import render, sample
from geoedit.testbeds.shapes.encoder import FeatureDistance
from geoedit.testbeds.shapes.pipelines import new_autoencoder


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_autoencoder().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return render(*sample(3, generator=torch.Generator().manual_seed(0)))


def by_hand(maps, maps_of_others):
    """Zhang et al. 2018, equation 1, with equal weights, one place at a time."""
    total = 0.0
    for ours, theirs in zip(maps, maps_of_others, strict=True):
        units = [
            [one[:, i, j] / one[:, i, j].norm() for i in range(one.shape[1]) for j in range(one.shape[2])]
            for one in (ours.detach(), theirs.detach())
        ]
        places = [float((a - b).square().sum()) for a, b in zip(*units, strict=True)]
        total += sum(places) / len(places)
    return total / len(maps)


def test_the_published_formula_on_an_autoencoder(autoencoder, images):
    def features(image):
        state = autoencoder.encoder.conv_in(image[None] * 2 - 1)
        maps = [state]
        for block in autoencoder.encoder.down_blocks:
            maps.append(block(maps[-1]))
        return [one[0] for one in [*maps, autoencoder.encoder.mid_block(maps[-1])]]

    found = FeatureDistance(autoencoder)(images[:2], images[1:])
    told = [by_hand(features(images[i]), features(images[i + 1])) for i in range(2)]
    assert found.tolist() == pytest.approx(told, rel=1e-4)


def test_what_a_distance_must_do(autoencoder, images, device):
    distance = FeatureDistance(autoencoder.to(device))
    images = images.to(device)
    assert distance(images, images).abs().max() == 0
    ahead, back = distance(images, images.roll(1, 0)), distance(images.roll(1, 0), images)
    assert torch.allclose(ahead, back) and (ahead > 0).all() and (ahead <= 4).all()
    near = distance(images, (images * 0.98).clamp(0, 1))
    assert (near < ahead).all()
    assert distance(images.double(), images.double().roll(1, 0)).dtype == torch.float64
    broken = images.clone()
    broken[1, 0, 0, 0] = math.nan
    assert distance(images, broken).isnan().tolist() == [False, True, False]
    assert distance(images[:0], images[:0]).shape == (0,)
    assert not any(module._forward_hooks for module in autoencoder.modules())


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_of_vision_transformers(kind, images):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    sight = {**small, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "vit":
            model = ViTModel(ViTConfig(**sight), add_pooling_layer=False).eval()
            seeing = model
        else:
            model = CLIPModel(CLIPConfig(vision_config=sight, text_config={**small, "vocab_size": 9})).eval()
            seeing = model.vision_model
    found = FeatureDistance(model)(images[:1], images[1:2]).detach()
    both = torch.nn.functional.interpolate(images[:2], (16, 16), mode="bicubic", antialias=True)
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    both = (both - mean[:, None, None]) / spread[:, None, None]
    states = seeing(pixel_values=both, output_hidden_states=True).hidden_states
    maps = [states[i].detach().mT[..., None] for i in (1, 2, 4, 5)]
    assert float(found) == pytest.approx(by_hand([m[0] for m in maps], [m[1] for m in maps]), rel=1e-4)


def test_bad_input(images):
    distance = FeatureDistance(lambda batch: [batch])
    with pytest.raises((EditError, TypeError), match=r"2,\s*3,\s*32,\s*32"):  # shapes are checked before
        distance(images, images[:2])
    with pytest.raises(EditError, match=r"from 0 to 1 to be compared, these from -1 to"):
        distance(images * 2 - 1, images)
    with pytest.raises(EditError, match=r"features of 6 images are maps"):
        FeatureDistance(lambda batch: [batch.sum(0)])(images, images)
    odd = torch.nn.Module()
    odd.encoder, odd.decoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with pytest.raises(EditError, match=r"no conv_in"):
        FeatureDistance(odd)
