"""Dimensions of samples whose dimension is known, and the estimators against their formulas, written out."""

import math

import numpy as np
import pytest
import torch

from experiments.benchmarks import sampled_shapes as shapes
from manifolds.curvature import intrinsic_dimension
from manifolds.errors import ManifoldError


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("dim", [1, 2, 5, 10])
def test_local_pca_on_spheres(dim, noise, device):
    sample = shapes.sphere(2000, dim, generator(dim)).embedded(64, noise, generator(1))
    found = intrinsic_dimension(sample.points.to(device), neighbors=60)
    assert found.value == found.low == dim and found.high <= dim + (dim == 10)
    assert found.pointwise.shape == (2000,) and float((found.pointwise == dim).double().mean()) > 0.9


def test_local_pca_where_the_dimension_changes():
    plane = torch.randn(1500, 2, generator=generator(2))
    ball = 20 + torch.randn(500, 4, generator=generator(3))
    points = torch.cat([torch.nn.functional.pad(plane, (0, 2)), ball])
    found = intrinsic_dimension(points, neighbors=50)
    assert (found.low, found.value, found.high) == (2.0, 2.0, 4.0)
    assert found.pointwise[:1500].median() == 2 and found.pointwise[1500:].median() == 4


@pytest.mark.parametrize("method", ["twonn", "mle"])
@pytest.mark.parametrize(("dim", "tolerance"), [(1, 0.06), (2, 0.06), (5, 0.1), (10, 0.2)])
def test_distances_give_the_dimension_inside_the_interval(dim, tolerance, method):
    sample = shapes.sphere(2000, dim, generator(10 + dim)).embedded(40, 0.0, generator(4))
    found = intrinsic_dimension(sample.points, method, neighbors=40)
    assert abs(found.value - dim) < tolerance * dim
    assert found.low < dim < found.high and found.low < found.value < found.high
    assert abs(float(found.pointwise.median()) - found.value) < 0.1 * dim


def test_twonn_against_its_censored_likelihood():
    points = torch.randn(300, 3, dtype=torch.float64, generator=generator(5))
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf).sort(1).values
    ratios = np.sort(np.log((distances[:, 1] / distances[:, 0]).numpy()))
    best = max(
        np.linspace(1, 6, 50001),
        key=lambda d: (np.log(d) - d * ratios[:270]).sum() - d * 30 * ratios[269],
    )
    assert abs(intrinsic_dimension(points, "twonn", neighbors=10).value - best) < 2e-4


def test_mle_against_the_formula():
    points = torch.randn(200, 3, dtype=torch.float64, generator=generator(6))
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf).sort(1).values[:, :12].numpy()
    inverses = [sum(math.log(row[-1] / row[j]) for j in range(11)) / (12 - 2) for row in distances]
    found = intrinsic_dimension(points, "mle", neighbors=12)
    assert abs(found.value - 1 / np.mean(inverses)) < 1e-9
    np.testing.assert_allclose(found.pointwise.numpy(), 1 / np.array(inverses), rtol=1e-9)


def test_the_interval_admits_what_noise_hides():
    sample = shapes.sphere(2000, 2, generator(7)).embedded(64, 0.02, generator(8))
    found = intrinsic_dimension(sample.points, "twonn", neighbors=40)
    assert found.low < 2 and found.high > 10


@pytest.mark.parametrize("method", ["local_pca", "twonn", "mle"])
def test_duplicates_outliers_and_constant_columns(method):
    plane = shapes.sphere(800, 2, generator(9)).points
    wide = torch.cat([plane, torch.ones(800, 3, dtype=torch.float64)], 1)
    far = torch.cat([wide, wide[:200], torch.full((1, 6), 1e4, dtype=torch.float64)])
    found = intrinsic_dimension(far, method, neighbors=30)
    assert len(found.pointwise) == 1001 and found.pointwise.isfinite().all()
    assert abs(found.value - 2) < 0.25


def test_dtype_follows_the_input():
    points = torch.randn(200, 2, generator=generator(10))
    assert intrinsic_dimension(points, neighbors=20).pointwise.dtype == torch.float32
    assert intrinsic_dimension(points.half(), neighbors=20).value == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(50, 3), "pca"), "local_pca, twonn, mle"),
        ((torch.randn(50, 3), "local_pca", 50), "1 to 49"),
        ((torch.randn(50, 3), "mle", 2), "3 or more"),
        ((torch.randn(1, 3).repeat(50, 1), "twonn", 10), "1 distinct"),
        ((torch.full((50, 3), torch.nan), "local_pca", 10), "50 of 50"),
    ],
)
def test_bad_input(arguments, message):
    if arguments[1] == "pca":
        with pytest.raises(Exception, match=r"method|local_pca"):
            intrinsic_dimension(*arguments)
        return
    with pytest.raises(ManifoldError, match=message):
        intrinsic_dimension(*arguments)
