"""Angles against scipy's, overlaps against a sum over numpy's singular vectors."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD
from peft_analysis.errors import UpdateError
from peft_analysis.subspaces import overlap, overlap_grid, principal_angles, singular_basis


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


SHAPES = [(9, 3, 4), (9, 4, 3), (5, 5, 2), (30, 1, 1), (1, 1, 1), (6, 9, 2), (40, 25, 25)]


@pytest.mark.parametrize(("m", "i", "j"), SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_angles_are_scipys(m, i, j, side, device):
    a, b = normal(m, i, seed=1, device=device), normal(m, j, seed=2, device=device)
    wanted = scipy.linalg.subspace_angles(a.cpu().numpy(), b.cpu().numpy())
    pair = (a, b) if side == "left" else (a.mT, b.mT)
    found = principal_angles(*pair, side=side)
    assert found.device == a.device and found.dtype == torch.float64
    common = max(
        i + j - m, 0
    )  # so many angles are zero; scipy takes them from their cosines: √ε is its error
    np.testing.assert_allclose(found.cpu().numpy(), wanted, atol=1e-7 if common else 1e-12)
    assert bool((found[len(found) - common :] < 1e-13).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_low_rank_matrices_are_compared_as_if_multiplied_out(dtype, side, device, monkeypatch):
    parts = [normal(30, 4, seed=1), normal(4, 20, seed=2), normal(30, 3, seed=3), normal(3, 20, seed=4)]
    a, b = LowRank(parts[0], parts[1]), LowRank(parts[2], parts[3])
    dense = [one.dense() if side == "left" else one.dense().mT for one in (a, b)]
    wanted = scipy.linalg.subspace_angles(*(one.numpy() for one in dense))[:3]
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("multiplied out"))
    found = principal_angles(a.to(device, dtype), b.to(device, dtype), side=side)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.cpu().numpy(), wanted, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 0.3, math.pi / 4, 1.5, math.pi / 2])
def test_an_angle_that_is_known_keeps_its_digits(angle):
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]], dtype=torch.float64)
    assert float(principal_angles(a, b)[0]) == pytest.approx(angle, rel=1e-12, abs=1e-16)


def test_rank_is_that_of_the_values_and_not_the_width():
    a = normal(12, 2, seed=1)
    twice = torch.cat([a, a @ normal(2, 3, seed=2)], 1)
    assert len(principal_angles(twice, twice)) == 2
    padded = LowRank(torch.cat([a, torch.zeros(12, 3, dtype=a.dtype)], 1), normal(5, 7, seed=3))
    assert len(principal_angles(padded, a)) == 2
    assert float(principal_angles(padded, a).max()) < 1e-12
    for zero in (torch.zeros(12, 4, dtype=a.dtype), torch.zeros(12, 0, dtype=a.dtype), LowRank.zeros(12, 4)):
        assert len(principal_angles(a, zero.to(torch.float64))) == 0


def test_against_the_top_of_a_base(device):
    base = normal(14, 10, seed=1, device=device)
    update = LowRank(normal(14, 2, seed=2, device=device), normal(2, 10, seed=3, device=device))
    u, _, vh = scipy.linalg.svd(base.cpu().numpy())
    for side, wanted, mine in (
        ("left", u[:, :3], update.left), ("right", vh[:3].T, update.right.mT)
    ):  # fmt: skip
        angles = scipy.linalg.subspace_angles(wanted, mine.cpu().numpy())
        for given in (base, BaseSVD.of(base)):
            found = principal_angles(given, update, side=side, top=(3, None))
            np.testing.assert_allclose(found.cpu().numpy(), angles, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_overlap_is_eq_4_of_lora(side, device):
    a, b = normal(12, 9, seed=1, device=device), normal(12, 9, seed=2, device=device)
    grid = overlap_grid(a, b, side=side)
    (ua, _, va), (ub, _, vb) = (np.linalg.svd(one.cpu().numpy(), full_matrices=False) for one in (a, b))
    x, y = (ua, ub) if side == "left" else (va.T, vb.T)
    for i, j in [(1, 1), (2, 5), (9, 3), (9, 9)]:
        wanted = sum((x[:, p] @ y[:, q]) ** 2 for p in range(i) for q in range(j)) / min(i, j)
        assert float(overlap(a, b, i, j, side=side)) == pytest.approx(wanted, abs=1e-12)
        assert float(grid[i - 1, j - 1]) == pytest.approx(wanted, abs=1e-12)
    assert grid.shape == (9, 9) and float(grid.min()) >= 0 and float(grid.max()) <= 1 + 1e-12


def test_overlap_of_one_space_in_another_is_one_and_of_orthogonal_ones_zero():
    basis = torch.linalg.qr(normal(10, 6))[0]
    small, large = basis[:, :2] * torch.tensor([3.0, 2.0]), basis[:, :4] * torch.tensor([9.0, 8.0, 0.1, 0.2])
    assert float(overlap(small, large, 2, 2)) == pytest.approx(1)
    assert float(overlap(small, basis[:, 4:], 2, 2)) == pytest.approx(0, abs=1e-15)
    assert float(overlap(small, large, 1, 4)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, device):
    a, b = (normal(20, 3, seed=seed, device=device).to(dtype) for seed in (1, 2))
    found = principal_angles(a, b)
    assert found.dtype == torch.float32
    wanted = scipy.linalg.subspace_angles(a.double().cpu().numpy(), b.double().cpu().numpy())
    np.testing.assert_allclose(found.cpu().numpy(), wanted, atol=1e-5)


def test_what_cannot_be_compared_is_refused():
    a = normal(6, 4)
    bad = a.clone()
    bad[0, 0] = torch.nan
    for other, message in [
        (normal(7, 4), "6 and 7 rows"), (bad, "NaN"), (LowRank(bad, normal(4, 3)), "NaN"), (a[0], "shape"),
        (normal(2, 6, 4), "shape"), (LowRank(normal(2, 6, 1), normal(2, 1, 4)), "batch"), (a.long(), "int64"),
    ]:  # fmt: skip
        with pytest.raises(UpdateError, match=message):
            principal_angles(a, other)
    with pytest.raises(UpdateError, match="4 and 5 columns"):
        principal_angles(a, normal(6, 5), side="right")
    for i in (0, 5, -1):
        with pytest.raises(UpdateError, match="has rank 4"):
            overlap(a, a, i, 1)
    assert singular_basis(a, top=2).shape == (6, 2)
