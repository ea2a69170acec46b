"""The comparison of curvature estimators: its closed forms, its references and its table, at small sizes."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.benchmarks import __main__, curvature_estimators, curvature_table
from experiments.benchmarks import sampled_shapes as shapes
from experiments.benchmarks.curvature_references import diffusion, quadratic


def generator(seed):
    return torch.Generator().manual_seed(seed)


def nearest_frame(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def nearest_of_rank_one(x):
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return s[..., :1, None] * u[..., :1] @ vh[..., :1, :]


@pytest.mark.parametrize(
    ("sample", "shape", "nearest"),
    [
        (shapes.stiefel(5, 4, 2, generator(0)), (4, 2), nearest_frame),
        (shapes.rank_one(5, 4, 3, generator(1)), (4, 3), nearest_of_rank_one),
    ],
)
def test_the_named_bend_is_the_acceleration_of_the_projected_line(sample, shape, nearest):
    x, v = sample.points.view(5, *shape), sample.direction.view(5, *shape)
    step = 1e-4
    ahead, behind = nearest(x + step * v), nearest(x - step * v)
    torch.testing.assert_close((ahead - behind) / (2 * step), v, rtol=1e-6, atol=1e-6)
    bend = (ahead + behind - 2 * x) / step**2
    torch.testing.assert_close(bend, sample.bend.view(5, *shape), rtol=1e-5, atol=1e-5)


def test_the_curvature_of_rank_one_is_what_gauss_says():
    sample = shapes.rank_one(3, 3, 4, generator(2))
    x = sample.points.view(3, 3, 4)
    u, s, vh = torch.linalg.svd(x)
    for row in range(3):
        left, right = u[row], vh[row].mT
        pairs = [torch.outer(left[:, i], right[:, 0]) for i in range(3)]
        pairs += [torch.outer(left[:, 0], right[:, j]) for j in range(1, 4)]

        def form(a, b, row=row, left=left, right=right):
            up = lambda z: left[:, 1:] @ left[:, 1:].mT @ z @ right[:, 0]  # noqa: E731
            vp = lambda z: right[:, 1:] @ right[:, 1:].mT @ z.mT @ left[:, 0]  # noqa: E731
            return (torch.outer(up(a), vp(b)) + torch.outer(up(b), vp(a))) / s[row, 0]

        scalar = sum(
            (form(a, a) * form(b, b)).sum() - form(a, b).square().sum() for a in pairs for b in pairs
        )
        torch.testing.assert_close(scalar / 30, sample.sectional[row])


def test_the_plain_fit_is_exact_on_a_graph_of_second_degree_at_its_apex():
    flat = torch.randn(400, 2, dtype=torch.float64, generator=generator(3))
    flat = torch.cat([torch.zeros(1, 2, dtype=torch.float64), flat, -flat])
    height = 0.5 * (0.8 * flat[:, 0] ** 2 + 0.3 * flat[:, 1] ** 2)
    points = torch.cat([0.3 * flat, 0.09 * height[:, None]], 1)
    ones = torch.ones(len(points), dtype=torch.float64)
    v = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64).expand(len(points), 3)
    sample = shapes.Sample(points, ones, ones, 2, v, v)
    for intercept in (True, False):
        found = quadratic(sample, torch.tensor([0]), 100, intercept=intercept)
        assert abs(float(found.sectional[0]) - 0.8 * 0.3) < 1e-8
        assert abs(float(found.lengths[0]) - 0.55) < 1e-8
        wanted = torch.tensor([[0.0, 0.0, 0.8 + 4 * 0.3]], dtype=torch.float64)
        torch.testing.assert_close(found.bend, wanted, rtol=1e-6, atol=1e-6)


def test_diffusion_geometry_orders_the_curvature_of_a_torus_and_turns_with_it():
    sample = shapes.torus(1500, generator(4))
    at = torch.arange(1500)
    found = diffusion(sample, at, 3).sectional
    assert float(torch.corrcoef(torch.stack([found, sample.sectional]))[0, 1]) > 0.95
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator(5))).Q
    turned = shapes.Sample(
        2 * sample.points @ axes.mT + 7, sample.mean_curvature / 2, sample.sectional / 4, 2
    )
    torch.testing.assert_close(diffusion(turned, at, 3).sectional, found / 4, rtol=1e-6, atol=1e-6)


def test_the_benchmark_at_a_small_size(monkeypatch):
    case = curvature_estimators.Case(
        lambda n, g: shapes.sphere(n, 2, g), 700, 40, curvature_estimators.THREE_PERCENT
    )
    monkeypatch.setattr(curvature_estimators, "CASES", {"small": case})
    # The peer is imported in seconds and works for a minute; here something else takes its time.
    slow = SimpleNamespace(fit_pw=lambda points, **how: time.sleep(0.2))
    peer = SimpleNamespace(id=SimpleNamespace(lPCA=lambda: slow))
    monkeypatch.setattr(curvature_estimators, "require", lambda name: peer)
    rows = curvature_estimators.run(curvature_estimators.Settings(ambient=8, queries=30, speed_points=110))
    assert len(rows) == 10
    assert [row["method"] for row in rows[:4]] == ["ours", "plain fit", "CAML (CRLM)", "diffusion geometry"]
    assert rows[0]["aims"] == [
        {"column": "mean_curvature_error", "limit": 0.03, "met": True},
        {"column": "sectional_off", "limit": 0.03, "met": True},
    ]
    assert rows[0]["sectional_error"] < 1e-6 < 0.01 < rows[1]["sectional_error"]
    assert rows[-2]["milliseconds_a_point"] > 0 and rows[-1]["ratio"] > 0
    machine = {"date": "d", "device": "x", "processor": "y", "versions": {}}
    found = json.loads(json.dumps({"curvature_estimators": {"machine": machine, "result": rows}}))
    page = __main__.page(found)
    assert "| small | 0 | 40 | ours | 100 % | < 0.01 % | < 0.01 % |" in page
    assert "scikit-dimension lPCA" in page and "ms a point" in page


def line(method, *, answered=1.0, sectional=None, length=None, correlation=None, noise=0.0, aims=()):
    return {
        "shape": "torus",
        "noise": noise,
        "method": method,
        "neighbors": 9,
        "answered": answered,
        "sectional_error": sectional,
        "mean_curvature_error": length,
        "correlation": correlation,
        "bend_error": None,
        "aims": list(aims),
    }


def test_the_table_says_who_is_nearer_to_the_truth():
    rows = [
        line(
            "ours",
            sectional=0.2,
            length=0.1,
            correlation=0.9,
            aims=[{"column": "correlation", "limit": 0.99, "met": False}],
        ),
        line("plain fit", sectional=0.1, length=0.3, correlation=0.8),
        line("diffusion geometry", sectional=0.3, correlation=0.95),
        line("ours", answered=0.0, noise=0.5),
        line("plain fit", sectional=2.0, length=3.0, noise=0.5),
        line("diffusion geometry", sectional=0.25, noise=0.5),
    ]
    text = "\n".join(curvature_table.curvature_table(rows))
    assert "correlation of K at least 0.99: **missed**" in text
    assert "smaller error in 1 of 2 comparisons." in text
    assert "larger one on: torus, noise 0, error of K (plain fit)." in text
    assert "nearer to the truth than ours on: torus, noise 0 (correlation 0.950 against 0.900)." in text
    assert "answers where ours refuses, on: torus, noise 0.5 (ours answers for no point" in text
    assert np.all([row.count("|") == 11 for row in text.splitlines() if row.startswith("| torus")])


def test_an_aim_against_a_peer_is_judged_by_the_peer():
    rows = [line("ours", length=0.2), line("plain fit", length=0.3)]
    aim = curvature_estimators.Aim("mean_curvature_error", "plain fit")
    assert curvature_estimators.judged(aim, rows)["met"]
    assert not curvature_estimators.judged(aim, [*rows[:1], line("plain fit", length=0.1)])["met"]
