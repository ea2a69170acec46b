"""Optimizers of adapters, and tangent spaces that a denoiser or samples know."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.training.geometry import DenoiserTangents, make_optimizer
from tests.geoedit.sliders.gaussian import SHAPE, gaussian_base

PREDICTIONS = ["epsilon", "v_prediction", "sample", "flow"]


def adapted(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)).requires_grad_(False)
        return inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1"]), net, "slider")


@pytest.mark.parametrize("optimizer", ["adamw", "low_rank_adam"])
def test_both_optimizers_lower_a_loss_and_touch_the_adapter_only(optimizer, device):
    net = adapted().to(device)
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1)).to(device)
    wanted = x[:, :8] * 2
    frozen = {name: p.clone() for name, p in net.named_parameters() if not p.requires_grad}
    stepper = make_optimizer({"unet": net}, optimizer=optimizer, learning_rate=4e-2)
    losses = []
    for _ in range(25):
        loss = (net(x) - wanted).square().mean()
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in net.named_parameters() if name in frozen)


def test_low_rank_adam_takes_the_same_path_whatever_the_factors_are():
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = []
    for factor in (1.0, 7.0):
        net = adapted().double()
        for layer in net:
            nn.init.normal_(layer.lora_B["slider"].weight, generator=torch.Generator().manual_seed(2))
            layer.lora_B["slider"].weight.data *= factor
            layer.lora_A["slider"].weight.data /= factor
        stepper = make_optimizer({"unet": net}, optimizer="low_rank_adam")
        for _ in range(5):
            stepper.zero_grad()
            (net(x) - x[:, :8]).square().mean().backward()
            stepper.step()
        layer = net[0]
        a = layer.lora_A["slider"].weight
        products.append(layer.lora_B["slider"].weight @ a)
        gram = (a @ a.mT).detach()
        torch.testing.assert_close(gram, torch.eye(2).double() * gram[0, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(products[0], products[1], rtol=1e-6, atol=1e-8)


def test_bad_optimizers_are_refused():
    with pytest.raises(EditError, match="'sgd'; there are adamw, low_rank_adam"):
        make_optimizer({"unet": adapted()}, optimizer="sgd")
    with pytest.raises(EditError, match="learning rate is nan"):
        make_optimizer({"unet": adapted()}, learning_rate=float("nan"))
    with pytest.raises(EditError, match="no parameter of unet requires gradients"):
        make_optimizer({"unet": nn.Linear(2, 2).requires_grad_(False)})
    with pytest.raises(EditError, match="no trainable LoRA pair"):
        make_optimizer({"unet": nn.Linear(2, 2)}, optimizer="low_rank_adam")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_denoiser_of_flat_pictures_projects_onto_their_plane(prediction):
    """Σ = U diag(s) Uᵀ: α ∂D/∂z = U diag(α² s / (α² s + σ²)) Uᵀ, which nears U Uᵀ as the noise goes."""
    base = gaussian_base(prediction, rank=3)
    tangents = DenoiserTangents(base, time=20.0)
    generator = torch.Generator().manual_seed(3)
    clean, change = torch.randn(2, 5, *SHAPE, generator=generator, dtype=torch.float64)
    found = tangents(clean, change, base.encode([""] * 5)).flatten(1)
    values, vectors = torch.linalg.eigh(base.covariance)
    signal, noise = (float(level) for level in base.levels(torch.tensor([20.0])))
    gains = signal**2 * values / (signal**2 * values + noise**2)
    exact = change.flatten(1) @ (vectors * gains) @ vectors.mT
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    plane = vectors[:, -3:]
    torch.testing.assert_close(found, change.flatten(1) @ plane @ plane.mT, rtol=0, atol=0.02)
    twice = DenoiserTangents(base, time=20.0, powers=2)(clean, change, base.encode([""] * 5))
    torch.testing.assert_close(twice.flatten(1), exact @ (vectors * gains) @ vectors.mT, rtol=1e-6, atol=1e-8)


def test_tangents_of_a_pipeline_are_the_derivative_that_differences_see(tiny_pipe, device):
    base = base_of(tiny_pipe)
    generator = torch.Generator().manual_seed(0)
    clean, change = torch.randn(2, 3, *base.latent_shape(), generator=generator)
    told, time = base.unconditional(3), torch.full((3,), 300.0)
    found = DenoiserTangents(base, time=300.0)(clean, change, told)
    signal, _ = base.levels(time)

    def denoised(x):
        with torch.no_grad():
            return base.clean(x, time, base.predict(x, time, told))

    step = 1e-2
    ahead, behind = (denoised(signal * (clean + sign * step * change)) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=0.02, atol=0.02)


def test_tangents_need_noise():
    base = gaussian_base("flow")
    with pytest.raises(EditError, match="no noise"):
        DenoiserTangents(base, time=0.0)
    with pytest.raises(EditError, match="once or more"):
        DenoiserTangents(base, powers=0)
