"""RiemannianMuon: its directions against dual certificates, dense SVDs and torch's own Muon."""

import geoopt
import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import manifolds
from manifolds.optim import RiemannianMuon
from manifolds.optim.orthogonal import newton_schulz, orthogonal_factor, stiefel_direction


def frame(*shape, dtype=torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0].to(dtype)


def dual_optimum(w: Tensor, g: Tensor) -> float:
    """The smallest nuclear norm of G + W S over symmetric S, by scipy from many entries."""
    n = w.shape[-1]
    upper = np.triu_indices(n)
    wn, gn = w.numpy(), g.numpy()

    def value(entries):
        s = np.zeros((n, n))
        s[upper] = entries
        s = s + s.T
        u, values, vt = np.linalg.svd(gn + wn @ s, full_matrices=False)
        slope = wn.T @ (u @ vt)
        slope = slope + slope.T
        return values.sum(), np.where(np.eye(n, dtype=bool), 2 * np.diag(np.diag(slope)) / 2, slope)[upper]

    inside = -(wn.T @ gn + gn.T @ wn) / 4
    best = scipy.optimize.minimize(value, inside[upper], jac=True, method="BFGS", options={"gtol": 1e-9})
    return float(best.fun)


@pytest.mark.parametrize("shape", [(6, 3), (12, 4), (9, 1), (20, 5)])
def test_the_direction_on_stiefel_is_optimal(shape):
    torch.manual_seed(0)
    w, g = frame(*shape), torch.randn(shape, dtype=torch.float64)
    found = stiefel_direction(w, g, max_iterations=500)
    a = found.vector
    assert float(torch.linalg.matrix_norm(a, 2)) <= 1 + 1e-6
    assert torch.allclose(w.mT @ a, -(w.mT @ a).mT, atol=1e-12)
    # Weak duality: no tangent A with ‖A‖₂ ≤ 1 has a larger ⟨G, A⟩ than the nuclear norm of any G + W S.
    assert float((g * a).sum()) == pytest.approx(dual_optimum(w, g), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_square_frames_have_the_closed_form(n):
    torch.manual_seed(0)
    w, g = frame(3, n, n), torch.randn(3, n, n, dtype=torch.float64)
    found = stiefel_direction(w, g)
    k = (w.mT @ g - g.mT @ w) / 2
    u, _, vt = torch.linalg.svd(k)
    expected = w @ (u @ vt) if n % 2 == 0 else torch.zeros_like(w)
    assert bool(found.converged.all()) and torch.allclose(found.vector, expected, atol=1e-6)


def test_a_batch_of_directions_is_a_loop_of_them():
    torch.manual_seed(0)
    w, g = frame(2, 3, 8, 3), torch.randn(2, 3, 8, 3, dtype=torch.float64)
    whole = stiefel_direction(w, g).vector
    for i in range(2):
        for j in range(3):
            assert torch.allclose(whole[i, j], stiefel_direction(w[i, j], g[i, j]).vector, atol=1e-12)


def test_degenerate_gradients_give_finite_directions():
    w = frame(7, 3)
    assert torch.equal(stiefel_direction(w, torch.zeros_like(w)).vector, torch.zeros_like(w))
    for g in (w @ torch.eye(3, dtype=torch.float64), torch.outer(torch.ones(7), torch.ones(3)).double()):
        a = stiefel_direction(w, g).vector
        assert a.isfinite().all() and float(torch.linalg.matrix_norm(a, 2)) <= 1 + 1e-6


@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_a_step_is_as_long_as_the_rate_in_the_spectral_norm(metric):
    torch.manual_seed(0)
    manifold = manifolds.Stiefel(metric)
    start = frame(10, 4)
    x = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    x.grad = torch.randn(10, 4, dtype=torch.float64)
    RiemannianMuon([x], lr=1e-5).step()
    moved = (x.detach().as_subclass(Tensor) - start) / 1e-5
    assert float(torch.linalg.matrix_norm(moved, 2)) == pytest.approx(1.0, abs=1e-3)
    expected = stiefel_direction(start, x.grad.as_subclass(Tensor)).vector
    assert torch.allclose(moved, -expected, atol=1e-3)


def test_newton_schulz_gets_near_the_orthogonal_factor(device):
    torch.manual_seed(0)
    for shape in ((5, 5), (3, 8, 4), (2, 4, 9)):
        matrix = torch.randn(shape, dtype=torch.float64, device=device)
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        exact = newton_schulz(matrix, 30, (1.5, -0.5, 0.0))
        assert torch.allclose(exact, u @ vt, atol=1e-4)
        values = torch.linalg.svdvals(newton_schulz(matrix, 8))
        assert float(values.max()) < 1.3 and float(values.min()) > 0.5


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_plain_matrices_move_as_with_torch(adjust):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    for shape in ((6, 4), (4, 6)):
        p, q = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        ours = RiemannianMuon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
        theirs = torch.optim.Muon([q], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
        for _ in range(5):
            gradient = torch.randn(shape)
            p.grad, q.grad = gradient.clone(), gradient.clone()
            ours.step()
            theirs.step()
        assert torch.allclose(
            p, q, atol=2e-2 * float((q - 1).abs().max())
        )  # torch computes rounds in bfloat16


def test_the_orthogonal_factor_in_factors_is_that_of_the_dense_matrix():
    torch.manual_seed(0)
    matrix = manifolds.LowRank(torch.randn(9, 4).double(), torch.randn(4, 7).double())
    u, _, vt = torch.linalg.svd(matrix.dense())
    assert torch.allclose(orthogonal_factor(matrix).dense(), u[:, :4] @ vt[:4], atol=1e-10)
    lost = manifolds.LowRank(matrix.left * torch.tensor([1.0, 0, 0, 0]), matrix.right)
    assert torch.allclose(
        torch.linalg.svdvals(orthogonal_factor(lost).dense())[:2], torch.tensor([1.0, 0]).double(), atol=1e-10
    )


def test_the_step_at_fixed_rank_is_riemannions_in_dense_matrices():
    torch.manual_seed(0)
    manifold = manifolds.FixedRank(8, 6)
    x = geoopt.ManifoldParameter(manifold.random(14, 2, dtype=torch.float64))
    start = x.detach().clone().as_subclass(Tensor)
    left, right = start[:8], start[8:]
    g = torch.randn(8, 6, dtype=torch.float64)
    x.grad = torch.cat([g @ right, g.mT @ left])
    RiemannianMuon([x], lr=1e-6).step()
    rows, columns = left @ torch.linalg.pinv(left), right @ torch.linalg.pinv(right)

    def project(z):
        return rows @ z + z @ columns - rows @ z @ columns

    u, _, vt = torch.linalg.svd(project(g))
    expected = project(u[:, :4] @ vt[:4])
    end = x.detach().as_subclass(Tensor)
    assert torch.allclose((end[:8] @ end[8:].mT - left @ right.mT) / -1e-6, expected, atol=1e-4)


@pytest.mark.parametrize(
    "manifold", [manifolds.Stiefel(), manifolds.Grassmann(), geoopt.EuclideanStiefel()], ids=str
)
def test_procrustes(manifold, descend):
    torch.manual_seed(0)
    target = frame(9, 3)
    x = geoopt.ManifoldParameter(frame(9, 3), manifold=manifold)
    optimizer = RiemannianMuon([x], lr=0.1, momentum=0.8)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-4, 200)
    losses = []
    for _ in range(200):
        losses += descend(optimizer, lambda: 3 - ((target.mT @ x) ** 2).sum(), 1)
        schedule.step()
    assert losses[-1] < 1e-5 < losses[0]


def test_low_rank_approximation(descend):
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(8, 6, dtype=torch.float64), full_matrices=False)
    target = u[:, :2] * torch.tensor([5.0, 1.0]) @ vt[:2]
    x = geoopt.ManifoldParameter(manifolds.FixedRank(8, 6).random(14, 2, dtype=torch.float64))
    optimizer = RiemannianMuon([x], lr=0.3, momentum=0.8)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-4, 100)
    for _ in range(100):
        losses = descend(optimizer, lambda: ((x[:8] @ x[8:].mT - target) ** 2).sum(), 1)
        schedule.step()
    assert losses[-1] < 1e-4


def test_what_has_no_step_is_refused_with_the_mend():
    with pytest.raises(manifolds.ManifoldError, match="RiemannianAdam"):
        RiemannianMuon([torch.nn.Parameter(torch.ones(3))])
    for manifold, point in (
        (manifolds.Sphere(), torch.tensor([1.0, 0])),
        (geoopt.Stiefel(), torch.eye(3, 2)),
    ):
        with pytest.raises(manifolds.ManifoldError, match="no step on"):
            RiemannianMuon([geoopt.ManifoldParameter(point, manifold=manifold)])
