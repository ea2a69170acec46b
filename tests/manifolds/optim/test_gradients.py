"""Clipping in the metric, against norms worked out by hand and torch's own clipping."""

import geoopt
import pytest
import torch

import manifolds
from manifolds.optim import clip_grad_norm_


def test_plain_tensors_are_clipped_as_torch_clips_them(device):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s, device=device)) for s in ((3, 2), (5,), ())]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = clip_grad_norm_(ours, 0.7)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)


def test_only_the_tangent_part_counts(device):
    x = torch.tensor([1.0, 0.0, 0.0], device=device)
    p = geoopt.ManifoldParameter(x, manifold=manifolds.Sphere())
    p.grad = torch.tensor([100.0, 3.0, 4.0], device=device)
    assert float(clip_grad_norm_(p, 1.0)) == pytest.approx(5.0)
    assert torch.allclose(p.grad, torch.tensor([20.0, 0.6, 0.8], device=device))


def test_the_norm_is_that_of_the_metric():
    # On this Poincaré ball the conformal factor is 2 / (1 - |x|²): the dual norm divides by it.
    x = torch.tensor([0.5, 0.0], dtype=torch.float64)
    p = geoopt.ManifoldParameter(x, manifold=geoopt.PoincareBall(c=1.0))
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert float(clip_grad_norm_([p], 100.0)) == pytest.approx(5.0 / (2 / (1 - 0.25)))
    assert torch.equal(p.grad, torch.tensor([3.0, 4.0], dtype=torch.float64))


def test_zero_and_missing_gradients_are_left_alone():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    assert float(clip_grad_norm_([p, q], 1.0)) == 0.0
    p.grad = torch.zeros(2)
    assert float(clip_grad_norm_([p, q], 1.0)) == 0.0
    assert torch.equal(p.grad, torch.zeros(2)) and q.grad is None


def test_bad_input_is_refused_and_nothing_changed():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    p.grad, q.grad = torch.ones(2), torch.tensor([1.0, torch.nan])
    with pytest.raises(manifolds.ManifoldError, match="parameter 1 has 1 entries"):
        clip_grad_norm_([p, q], 0.1)
    assert torch.equal(p.grad, torch.ones(2))
    with pytest.raises(manifolds.ManifoldError, match="max_norm"):
        clip_grad_norm_([p], -1.0)
