"""`FixedRank` against pymanopt's `FixedRankEmbedded`, where pymanopt is right: distinct singular values."""

import numpy as np
import pymanopt
import pytest
import torch

from manifolds.fixed_rank import FixedRank

M, N, R = 7, 5, 3


@pytest.fixture
def pair():
    """Both manifolds, a point, two tangent vectors and a second point, and the way from theirs to ours."""
    np.random.seed(0)
    theirs, ours = pymanopt.manifolds.FixedRankEmbedded(M, N, R), FixedRank(M, N)

    def point(p):
        root = np.sqrt(p.s)
        return torch.tensor(np.vstack([p.u * root, p.vt.T * root]))

    def vector(p, t):
        root = np.sqrt(p.s)
        left, right = t.Up / root + p.u @ t.M / root / 2, t.Vp / root + p.vt.T @ t.M.T / root / 2
        return torch.tensor(np.vstack([left, right]))

    x, y = theirs.random_point(), theirs.random_point()
    return theirs, ours, x, y, theirs.random_tangent_vector(x), theirs.random_tangent_vector(x), point, vector


def test_inner_transport_projection_and_retraction(pair):
    theirs, ours, x, y, u, v, point, vector = pair
    X, Y, U, V = point(x), point(y), vector(x, u), vector(x, v)
    assert ours.contains(X) and ours.contains_tangent(X, U)
    assert abs(float(ours.inner(X, U, V)) - theirs.inner_product(x, u, v)) < 1e-13
    torch.testing.assert_close(ours.transp(X, Y, U), vector(y, theirs.transport(x, y, u)))
    ambient = np.random.normal(size=(M, N))
    found = ours.project_ambient(X, torch.tensor(ambient))
    torch.testing.assert_close(found, vector(x, theirs.projection(x, ambient)))
    reached = theirs.retraction(x, u)
    dense = torch.tensor(reached.u * reached.s @ reached.vt)
    torch.testing.assert_close(ours.to_lowrank(ours.retr_projection(X, U)).dense(), dense)


def test_gradient(pair):
    theirs, ours, x, _, _, _, point, vector = pair
    G = np.random.normal(size=(M, N))
    euclidean = (G @ x.vt.T * x.s, np.diag(x.u.T @ G @ x.vt.T), (G.T @ x.u * x.s).T)
    X = point(x)
    stacked = torch.cat([torch.tensor(G) @ X[M:], torch.tensor(G).mT @ X[:M]])
    found = theirs.euclidean_to_riemannian_gradient(x, euclidean)
    torch.testing.assert_close(ours.egrad2rgrad(X, stacked), vector(x, found))
