"""RiemannianAdam against torch's Adam, geoopt's, closed-form minima, and what the metric asks for."""

import geoopt
import pytest
import torch
from torch import Tensor

import manifolds
from manifolds.optim import RiemannianAdam


def plain(p) -> Tensor:
    return p.detach().clone().as_subclass(Tensor)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("peer", [torch.optim.Adam, torch.optim.AdamW])
def test_plain_tensors_move_as_with_torch(peer, amsgrad, weight_decay, maximize, device):
    torch.manual_seed(0)
    start = [
        torch.randn(s, dtype=torch.float64, device=device) for s in ((4, 3), (5,), (), (2, 3, 4), (4, 3))
    ]
    ours, theirs = ([torch.nn.Parameter(s.clone()) for s in start] for _ in range(2))
    options = {
        "lr": 0.03,
        "betas": (0.8, 0.95),
        "amsgrad": amsgrad,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    one = RiemannianAdam(ours, decoupled_weight_decay=peer is torch.optim.AdamW, **options)
    other = peer(theirs, **options)
    for _ in range(25):
        for optimizer, parameters in ((one, ours), (other, theirs)):
            optimizer.zero_grad()
            sum(torch.sin(3 * p).sum() + (p**4).sum() for p in parameters).backward()
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize(
    "manifold, shape",
    [
        (geoopt.EuclideanStiefel(), (7, 3)), (geoopt.EuclideanStiefel(), (2, 5, 5)), (geoopt.Sphere(), (6,)),
        (geoopt.PoincareBall(c=1.0), (3, 4)), (geoopt.SymmetricPositiveDefinite(), (4, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_iterates_are_those_of_geoopt_on_its_manifolds(manifold, shape, amsgrad, weight_decay):
    torch.manual_seed(0)
    start = (
        0.1 * torch.randn(shape, dtype=torch.float64)
        if "Ball" in str(manifold)
        else torch.randn(shape).double()
    )
    start = manifold.projx(start)
    if "SymmetricPositive" in str(manifold):
        start = torch.eye(4, dtype=torch.float64) * 2
    target = torch.randn(shape, dtype=torch.float64)
    runs = []
    for make in (RiemannianAdam, geoopt.optim.RiemannianAdam):
        p = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
        optimizer = make([p], lr=0.02, amsgrad=amsgrad, weight_decay=weight_decay)
        for _ in range(15):
            optimizer.zero_grad()
            ((p - target) ** 2).sum().backward()
            optimizer.step()
        runs.append(plain(p))
    assert torch.allclose(*runs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_rayleigh_quotient_on_the_sphere(batch, dtype, device, descend):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(*batch, 6, 6, dtype=dtype, device=device))[0]
    a = basis * torch.arange(1, 7, dtype=dtype, device=device) @ basis.mT
    start = torch.randn(*batch, 6, dtype=dtype, device=device)
    x = geoopt.ManifoldParameter(start / start.norm(dim=-1, keepdim=True), manifold=manifolds.Sphere())
    optimizer = RiemannianAdam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-4, 200)
    for _ in range(200):
        descend(optimizer, lambda: (x.unsqueeze(-2) @ a @ x.unsqueeze(-1)).sum(), 1)
        schedule.step()
    found = (x.unsqueeze(-2) @ a @ x.unsqueeze(-1)).detach()[..., 0, 0]
    assert torch.allclose(found, torch.ones_like(found), atol=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_procrustes_on_stiefel(metric, device, descend):
    torch.manual_seed(0)
    target = torch.randn(4, 9, 3, dtype=torch.float64, device=device)
    manifold = manifolds.Stiefel(metric=metric)
    x = geoopt.ManifoldParameter(manifold.random(4, 9, 3, dtype=torch.float64, device=device))
    optimizer = RiemannianAdam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-5, 400)
    for _ in range(400):
        descend(optimizer, lambda: ((x - target) ** 2).sum() / 2, 1)
        schedule.step()
    u, _, vt = torch.linalg.svd(target, full_matrices=False)
    assert torch.allclose(plain(x), u @ vt, atol=1e-4)


def test_low_rank_approximation(descend):
    torch.manual_seed(0)
    manifold = manifolds.FixedRank(8, 6)
    u, _, vt = torch.linalg.svd(torch.randn(8, 6, dtype=torch.float64), full_matrices=False)
    target = u * torch.tensor([5.0, 4, 3, 0.3, 0.2, 0.1]) @ vt
    x = geoopt.ManifoldParameter(manifold.random(14, 3, dtype=torch.float64))
    optimizer = RiemannianAdam([x], lr=0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-4, 500)
    for _ in range(500):
        descend(optimizer, lambda: ((x[:8] @ x[8:].mT - target) ** 2).sum() / 2, 1)
        schedule.step()
    best = u[:, :3] * torch.tensor([5.0, 4, 3]) @ vt[:3]
    assert torch.allclose(plain(x)[:8] @ plain(x)[8:].mT, best, atol=1e-3)


@pytest.mark.parametrize(
    "manifold, shape",
    [
        (manifolds.Sphere(), (3, 5)), (manifolds.Stiefel("euclidean"), (3, 6, 2)),
        (manifolds.Stiefel("canonical"), (3, 6, 2)),
        (manifolds.Grassmann(), (3, 6, 2)), (manifolds.SPD(), (3, 4, 4)),
        (manifolds.FixedRank(5, 4), (3, 9, 2)),
        (manifolds.SpecialOrthogonal(), (3, 4, 4)), (manifolds.Oblique(), (3, 4, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_every_manifold_moments_stay_tangent_and_points_stay_on(manifold, shape, device):
    torch.manual_seed(0)
    x = geoopt.ManifoldParameter(manifold.random(*shape, dtype=torch.float64, device=device))
    target = torch.randn(shape, dtype=torch.float64, device=device)
    optimizer = RiemannianAdam([x], lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        value = x[..., :5, :] @ x[..., 5:, :].mT if "FixedRank" in str(manifold) else x
        (torch.sin(value) * target[..., : value.shape[-2], :1]).sum().backward()
        optimizer.step()
        assert manifold.contains(plain(x), tolerance=1e-9), manifold.contains(plain(x)).reason
        moment = optimizer.state[x]["exp_avg"]
        found = manifold.contains_tangent(plain(x), moment, tolerance=1e-8)
        assert found, found.reason
        assert optimizer.state[x]["exp_avg_sq"].numel() == 3


@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_a_first_step_is_as_long_as_the_rate_in_the_metric(metric):
    # After one step m̂ / v̂^½ is r / ‖r‖ whatever the gradient: the distance moved is the learning rate.
    torch.manual_seed(0)
    manifold = manifolds.Stiefel(metric)
    start = manifold.random(7, 3, dtype=torch.float64)
    x = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    x.grad = 1e3 * torch.randn(7, 3, dtype=torch.float64)
    RiemannianAdam([x], lr=1e-4).step()
    assert float(manifold.dist(plain(start), plain(x))) == pytest.approx(1e-4, rel=1e-5)


def test_the_step_does_not_depend_on_the_basis_of_the_surrounding_space():
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    start, target = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0], torch.randn(6, 2).double()
    ends = []
    for q in (torch.eye(6, dtype=torch.float64), turn):
        x = geoopt.ManifoldParameter(q @ start, manifold=manifolds.Stiefel())
        optimizer = RiemannianAdam([x], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            ((x - q @ target) ** 4).sum().backward() if q is not turn else (
                (q.mT @ x - target) ** 4
            ).sum().backward()
            optimizer.step()
        ends.append(q.mT @ plain(x))
    assert torch.allclose(*ends, atol=1e-9)


def test_blocks_of_a_large_batch_give_what_the_whole_gives(monkeypatch):
    from manifolds.optim import base

    ends = []
    for block in (1, 40, 2**30):
        monkeypatch.setattr(base, "BLOCK", block)
        torch.manual_seed(0)
        x = geoopt.ManifoldParameter(manifolds.Stiefel().random(7, 5, 2), manifold=None)
        optimizer = RiemannianAdam([x], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            torch.sin(x).sum().backward()
            optimizer.step()
        ends.append(plain(x))
    assert torch.allclose(ends[0], ends[2], atol=1e-6) and torch.allclose(ends[1], ends[2], atol=1e-6)


def test_half_precision_parameters_are_stepped_in_float32(device):
    torch.manual_seed(0)
    manifold = manifolds.Stiefel()
    start = plain(manifold.random(6, 3, device=device))
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        x = geoopt.ManifoldParameter(start.to(dtype), manifold=manifold)
        optimizer = RiemannianAdam([x], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (x.float() ** 3).sum().backward()
            optimizer.step()
        assert x.dtype == dtype
        ends.append(plain(x).float())
    assert torch.allclose(*ends, atol=3e-2)
