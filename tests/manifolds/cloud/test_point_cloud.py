"""Manifolds learned from samples, against closed forms."""

import pytest
import torch

from manifolds.cloud.learned import LearnedManifold
from manifolds.cloud.point_cloud import PointCloud
from manifolds.errors import ManifoldError


def turned(points, width, seed=0):
    """The points in `width` dimensions, rotated at random."""
    g = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=g)).Q
    return points @ frame[: points.shape[1]]


def sphere(count, dim, width, sigma=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(count, dim + 1, dtype=torch.float64, generator=g), dim=1)
    return turned(x, width) + sigma * torch.randn(count, width, dtype=torch.float64, generator=g)


@pytest.fixture(scope="module")
def ball():
    """A unit 2-sphere in 12 dimensions, learned from 1200 samples without noise."""
    return PointCloud.fit(sphere(1200, 2, 12), dim=2)


def test_feet_on_a_sphere_are_the_nearest_points(ball, device):
    cloud = PointCloud.rebuild(*ball.describe()).to(device)
    y = sphere(200, 2, 12, seed=3).to(device)
    x = y * torch.linspace(0.7, 1.3, 200, dtype=torch.float64, device=device)[:, None]
    found = cloud.project(x)
    torch.testing.assert_close(found.foot, y, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.distance, (x - y).norm(dim=-1), rtol=0, atol=1e-9)
    assert (found.tangent.mT @ y[..., None]).abs().max() < 1e-8
    assert found.inside.all()


def test_to_a_file_and_back_to_the_bit(ball, tmp_path):
    ball.save(tmp_path / "ball.safetensors")
    again = LearnedManifold.load(tmp_path / "ball.safetensors")
    assert isinstance(again, PointCloud) and (again.noise, again.reach) == (ball.noise, ball.reach)
    x = 1.1 * sphere(20, 2, 12, seed=4)
    assert torch.equal(again.projx(x), ball.projx(x))


def test_another_width_is_refused(ball):
    with pytest.raises(ManifoldError, match="width 12"):
        ball.project(torch.zeros(3, 13))
