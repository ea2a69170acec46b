"""RiemannianSGD against torch's SGD, and transport of its momentum against a hand-made run on the sphere."""

from itertools import pairwise

import geoopt
import pytest
import torch
from torch import Tensor

import manifolds
from manifolds.optim import RiemannianSGD


@pytest.mark.parametrize(
    "options",
    [
        {}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True},
        {"weight_decay": 0.2}, {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)  # fmt: skip
def test_plain_tensors_move_as_with_torch(options, device):
    torch.manual_seed(0)
    start = [torch.randn(s, dtype=torch.float64, device=device) for s in ((4, 3), (5,), (), (4, 3))]
    ours, theirs = ([torch.nn.Parameter(s.clone()) for s in start] for _ in range(2))
    one, other = RiemannianSGD(ours, lr=0.01, **options), torch.optim.SGD(theirs, lr=0.01, **options)
    for _ in range(20):
        for optimizer, parameters in ((one, ours), (other, theirs)):
            optimizer.zero_grad()
            sum(torch.sin(3 * p).sum() for p in parameters).backward()
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


def test_momentum_is_carried_by_parallel_transport_on_the_sphere():
    # A constant gradient along a great circle: transported momentum stays along it, so that all steps
    # stay in its plane and grow as without curvature: b = g, (1 + μ) g, (1 + μ + μ²) g, ...
    lr, mu = 0.01, 0.5
    x = geoopt.ManifoldParameter(
        torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), manifold=manifolds.Sphere()
    )
    optimizer = RiemannianSGD([x], lr=lr, momentum=mu)
    angles = [0.0]
    for _ in range(3):
        point = x.detach()
        x.grad = torch.tensor([float(point[1]), -float(point[0]), 0.0], dtype=torch.float64)
        optimizer.step()
        angles.append(float(torch.atan2(x[1], x[0])))
    steps = [b - a for a, b in pairwise(angles)]
    expected = [torch.atan(torch.tensor(lr * f, dtype=torch.float64)) for f in (1, 1 + mu, 1 + mu + mu**2)]
    assert steps == pytest.approx([float(e) for e in expected], rel=1e-12)
    assert float(x[2].abs()) == 0.0


@pytest.mark.parametrize(
    "options", [{"momentum": -0.1}, {"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}]
)
def test_options_that_mean_nothing_raise(options):
    with pytest.raises(manifolds.ManifoldError):
        RiemannianSGD([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_largest_eigenvectors_on_grassmann(momentum, descend):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    a = basis * torch.tensor([9.0, 8, 7, 3, 2, 1, 0.5, 0.1], dtype=torch.float64) @ basis.mT
    x = geoopt.ManifoldParameter(manifolds.Grassmann().random(8, 3, dtype=torch.float64))
    descend(RiemannianSGD([x], lr=0.02, momentum=momentum, maximize=True), lambda: (x * (a @ x)).sum(), 300)
    projector = x.detach().as_subclass(Tensor) @ x.detach().as_subclass(Tensor).mT
    assert torch.allclose(projector, basis[:, :3] @ basis[:, :3].mT, atol=1e-6)
