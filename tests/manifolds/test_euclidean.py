"""The flat space, with its number of dimensions a point."""

import pytest
import torch

from manifolds.checks import check
from manifolds.errors import ManifoldError
from manifolds.euclidean import Euclidean


@pytest.mark.parametrize(
    ("ndim", "shape"), [(0, (3,)), (1, (4,)), (1, (2, 1)), (2, (2, 3, 2)), (3, (2, 2, 2))]
)
def test_every_property_holds(ndim: int, shape: tuple[int, ...]) -> None:
    result = check(Euclidean(ndim), size=shape)
    assert result.passed, str(result)


def test_sizes_follow_the_number_of_dimensions() -> None:
    x, y = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert Euclidean(0).dist(x, y).shape == (2, 3, 4)
    torch.testing.assert_close(Euclidean(1).dist(x, y), torch.full((2, 3), 2.0))
    torch.testing.assert_close(Euclidean(2).dist(x, y), torch.full((2,), 12.0**0.5))
    assert Euclidean(2).dist(x, y, keepdim=True).shape == (2, 1, 1)
    assert [Euclidean(k).dimension(x) for k in range(4)] == [1, 4, 12, 24]
    assert torch.equal(Euclidean(1).component_inner(x, y, 3 * y), 3 * y)
    assert float(Euclidean(1).origin(5).abs().max()) == 0.0


def test_bad_input_is_named() -> None:
    with pytest.raises(ManifoldError, match="ndim is -1"):
        Euclidean(-1)
    assert "finite" in Euclidean().contains(torch.tensor([[0.0], [torch.inf]])).reason


def test_logarithm_by_hand() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -1.0])
    torch.testing.assert_close(Euclidean().logmap(x, y), torch.tensor([3.0, -3.0]))
