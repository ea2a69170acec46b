"""The effective rank along W + tΔW against numpy's singular values, its slope against autograd."""

import math

import numpy as np
import pytest
import torch

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, SVDCache
from peft_analysis.errors import UpdateError
from peft_analysis.rank_path import effective_rank_slope, rank_path

STEPS = (-0.5, 0.0, 0.3, 1.0, 4.0)


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def effective_rank(matrix):
    """exp of the entropy of the singular values' shares."""
    values = torch.linalg.svdvals(matrix)
    share = values / values.sum()
    return torch.special.entr(share).sum().exp()


@pytest.mark.parametrize("shape", [(14, 14), (20, 9), (9, 20), (1, 6), (6, 1)])
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_curve_and_slope(shape, form, device):
    m, n = shape
    W = normal(m, n, device=device)
    change = LowRank(normal(m, 2, seed=1, device=device), normal(2, n, seed=2, device=device))
    dense = change.dense()
    given = change if form == "low rank" else dense
    path = rank_path(W, given, STEPS)
    for t, rank, slope in zip(STEPS, path.effective_rank, path.slope, strict=True):
        place = torch.tensor(t, dtype=torch.float64, device=device, requires_grad=True)
        wanted = effective_rank(W + place * dense)
        (steep,) = torch.autograd.grad(wanted, place)
        assert float(rank) == pytest.approx(wanted.item(), rel=1e-10)
        assert float(slope) == pytest.approx(float(steep), rel=1e-6, abs=1e-9)
    assert float(effective_rank_slope(W, given)) == pytest.approx(float(path.slope[1]), rel=1e-9, abs=1e-12)
    assert path.change == pytest.approx(float(path.effective_rank[-1] - path.effective_rank[0]))
    assert path.lowest == STEPS[int(path.effective_rank.argmin())]


def test_strengthening_the_largest_value_lowers_the_rank_and_the_smallest_raises_it(device):
    W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64, device=device))
    for place, sign in ((0, -1), (3, 1)):
        spike = torch.zeros_like(W)
        spike[place, place] = 1
        assert math.copysign(1, float(effective_rank_slope(W, spike))) == sign
    path = rank_path(W, W, (0.0, 1.0, 7.0))
    assert float(path.slope.abs().max()) < 1e-12 and abs(path.change) < 1e-12


def test_repeated_values_have_a_slope_too(device):
    W = torch.eye(8, dtype=torch.float64, device=device)
    W[0, 0] = 3
    change = normal(8, 8, seed=1, device=device)
    step = 1e-6
    ends = [float(effective_rank(W + sign * step * change)) for sign in (-1, 1)]
    slope = float(effective_rank_slope(W, change))
    assert slope == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4)


def test_a_rank_that_opens_has_an_infinite_slope(device):
    W = normal(10, 3, device=device) @ normal(3, 8, seed=1, device=device)
    inside = BaseSVD.of(W).U[:, :3] @ normal(3, 8, seed=2, device=device)
    for matrix, within in ((W, inside), (W.mT, inside.mT)):
        outside = LowRank(
            normal(len(matrix), 1, seed=3, device=device), normal(1, matrix.shape[1], device=device)
        )
        assert float(effective_rank_slope(matrix, outside)) == math.inf
        path = rank_path(matrix, outside, (0.0, 0.01))
        assert path.slope.isinf().tolist() == [True, False]  # then the update lies in spaces that are there
        assert float(effective_rank_slope(matrix, within)) == pytest.approx(
            float(rank_path(matrix, within, (0.0,)).slope[0])
        )
        assert math.isfinite(float(effective_rank_slope(matrix, within)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_and_a_base_with_an_outlier(dtype, device):
    W = normal(60, 50, device=device)
    W[:, 0] *= 1e4
    W, change = (
        W.to(dtype),
        LowRank(normal(60, 2, seed=1, device=device), normal(2, 50, seed=2, device=device)),
    )
    change = LowRank(change.left.to(dtype), change.right.to(dtype))
    path = rank_path(W, change, (0.0, 1.0), cache=SVDCache())
    tuned = W.double() + change.left.double() @ change.right.double()
    np.testing.assert_allclose(
        path.effective_rank.cpu(), [float(effective_rank(one)) for one in (W.double(), tuned)], rtol=1e-4
    )
    assert bool(path.slope.isfinite().all())


def test_a_small_value_is_no_zero(device):
    """Trained weights have values below ε₃₂ of the largest; those still have a slope."""
    W = torch.diag(torch.tensor([50.0, 2.0, 1.0, 1e-5], dtype=torch.float32, device=device))
    change = normal(4, 4, seed=1, dtype=torch.float32, device=device)
    t = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    (wanted,) = torch.autograd.grad(effective_rank(W.double() + t * change.double()), t)
    assert effective_rank_slope(W, change).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert rank_path(W, change, (0,)).slope.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_makes_no_sense_is_refused():
    W = normal(5, 4)
    for call, message in [
        (lambda: rank_path(W, W, ()), "t is"), (lambda: rank_path(W, W, (math.nan,)), "t is"),
        (lambda: rank_path(W, -W, (1.0,)), "zero"), (lambda: effective_rank_slope(W * 0, W), "zero"),
        (lambda: rank_path(W, W.mT), "shape"), (lambda: rank_path(W * torch.nan, W), "NaN"),
    ]:  # fmt: skip
        with pytest.raises(UpdateError, match=message):
            call()
