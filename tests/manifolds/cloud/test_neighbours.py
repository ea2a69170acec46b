"""Neighbours against all differences, written out."""

import pytest
import torch

from manifolds.cloud import neighbours
from manifolds.cloud.neighbours import nearest_neighbours
from manifolds.errors import ManifoldError


def brute(points, queries, own, k):
    distances = (queries.double()[:, None] - points.double()[None]).norm(dim=-1)
    if own is not None:
        distances[torch.arange(len(own)), own] = torch.inf
    order = distances.sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "width", "k"), [(400, 3, 5), (300, 40, 20), (2, 1, 1), (30, 7, 29)])
def test_all_differences_agree(n, width, k, dtype, device):
    points = torch.randn(n, width, generator=torch.Generator().manual_seed(n)).to(dtype)
    found = nearest_neighbours(points.to(device), neighbors=k)
    values, indices = brute(points, points, torch.arange(n), k)
    assert found.distances.dtype == dtype
    torch.testing.assert_close(found.distances.cpu().double(), values, rtol=1e-5, atol=1e-6)
    if dtype == torch.float64:
        assert torch.equal(found.indices.cpu(), indices)


def test_places_and_indices(device):
    points = torch.randn(200, 4, dtype=torch.float64, device=device)
    at = torch.tensor([5, -1, 5], device=device)
    found = nearest_neighbours(points, at, neighbors=3)
    _, indices = brute(points.cpu(), points.cpu()[at.cpu()], at.cpu() % 200, 3)
    assert torch.equal(found.indices.cpu(), indices)
    place = nearest_neighbours(points, points[:2], neighbors=1)
    assert place.indices[:, 0].tolist() == [0, 1] and place.distances.max() == 0


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_tiny_cluster_in_a_large_cloud_keeps_its_digits(offset):
    g = torch.Generator().manual_seed(0)
    cloud = torch.randn(500, 6, dtype=torch.float64, generator=g)
    cluster = 1 + 1e-7 * torch.randn(60, 6, dtype=torch.float64, generator=g)
    points = torch.cat([cloud, cluster]) + offset
    found = nearest_neighbours(points, torch.arange(500, 560), neighbors=10)
    values, indices = brute(points, points[500:], torch.arange(500, 560), 10)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.distances, values, rtol=1e-12, atol=0)


def test_duplicates_are_neighbours_and_ties_go_to_the_lower_index():
    points = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0], [-1.0]])
    found = nearest_neighbours(points, neighbors=3)
    assert found.indices[0].tolist() == [2, 4, 1] and found.distances[0].tolist() == [0, 0, 1]
    assert found.indices[1].tolist() == [3, 0, 2]
    many = nearest_neighbours(points[:1].repeat(300, 1), torch.tensor([7]), neighbors=4)
    assert many.indices[0].tolist() == [0, 1, 2, 3]


def test_an_outlier_does_not_cost_the_others_their_speed(monkeypatch):
    points = torch.randn(3000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points[7] = 1e6
    calls = []
    whole = neighbours._distances
    monkeypatch.setattr(neighbours, "_distances", lambda *a: calls.append(1) or whole(*a))
    found = nearest_neighbours(points, torch.arange(0, 3000, 10), neighbors=8)
    at = torch.arange(0, 3000, 10)
    assert torch.equal(found.indices, brute(points, points[at], at, 8)[1]) and len(calls) < 30


def test_blocks_do_not_change_the_answer(monkeypatch):
    points = torch.randn(700, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = nearest_neighbours(points, neighbors=6)
    for name in ("BLOCK_ELEMENTS", "KEPT_ELEMENTS", "CACHED_ELEMENTS"):
        monkeypatch.setattr(neighbours, name, 500)
    pieces = nearest_neighbours(points, neighbors=6)
    assert torch.equal(whole.indices, pieces.indices) and torch.equal(whole.distances, pieces.distances)


@pytest.mark.parametrize(
    ("points", "at", "k", "message"),
    [
        (torch.randn(5, 2), None, 5, "1 to 4"),
        (torch.randn(5, 2), None, 0, "1 to 4"),
        (torch.randn(5, 2), torch.randn(3, 2), 6, "1 to 5"),
        (torch.tensor([[0.0], [torch.inf], [1.0]]), None, 1, "row 1"),
        (torch.randn(5, 2), torch.tensor([5]), 1, "there are 5"),
        (torch.randn(5, 2), torch.randn(3, 4), 1, "as points have"),
        (torch.randn(5, 2), torch.tensor([], dtype=torch.long), 1, "empty"),
        (torch.randn(5, 2), torch.full((1, 2), torch.nan), 1, "NaN"),
        (torch.randn(0, 2), None, 1, "nothing"),
    ],
)
def test_bad_input(points, at, k, message):
    with pytest.raises(ManifoldError, match=message):
        nearest_neighbours(points, at, neighbors=k)
