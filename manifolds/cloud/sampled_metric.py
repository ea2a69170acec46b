"""A Riemannian metric known at samples, as that which a network pulls back: carried without the network."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifolds.cloud.kept import in_single
from manifolds.cloud.neighbours import check_points, nearest_neighbours
from manifolds.errors import ManifoldError
from manifolds.operations import widened

if TYPE_CHECKING:
    from manifolds.cloud.learned import LearnedManifold


class SampledMetric(nn.Module):
    """The metric g(x) = Σ wᵢ(x) Fᵢᵀ Fᵢ + ε I with weights wᵢ ∝ exp(−‖x − aᵢ‖² / 2h²) that sum to one.

    It is smooth everywhere and positive (semi-)definite; near one anchor alone it is that anchor's.
    Between anchors it is their mean, off from a smooth metric by about h²/2 times its second derivative: take
    anchors as close as the metric changes.

    Of a map f with Jacobian J and a metric M on its outputs, F = M^½ J at the anchors makes the
    metric that f pulls back; the largest singular directions of `Pullback` suffice as its rows.

    Args:
        anchors: where the metric is known.
        factors: F at each anchor, with as many rows as are needed.
        damping: ε ≥ 0.
        bandwidth: h; the median distance of an anchor from its nearest one, if not given.

    Raises:
        ManifoldError: something is not finite or does not fit.

    Example:
        >>> line = torch.linspace(0, 1, 11)[:, None]
        >>> metric = SampledMetric(line, 2 * torch.ones(11, 1, 1))
        >>> metric.inner(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(4.)
    """

    anchors: Tensor
    factors: Tensor

    def __init__(
        self,
        anchors: Float[Tensor, "m D"],
        factors: Float[Tensor, "m r D"],
        *,
        damping: float = 0.0,
        bandwidth: float | None = None,
    ) -> None:
        super().__init__()
        check_points(anchors, "SampledMetric")
        if factors.ndim != 3 or factors.shape[0] != len(anchors) or factors.shape[2] != anchors.shape[1]:
            raise ManifoldError(
                f"SampledMetric: factors have shape {tuple(factors.shape)}; give (anchors, rows, width), "
                f"here ({len(anchors)}, rows, {anchors.shape[1]})"
            )
        if factors.dtype != anchors.dtype or factors.device != anchors.device:
            raise ManifoldError(
                f"SampledMetric: anchors are {anchors.dtype} on {anchors.device} and factors "
                f"{factors.dtype} on {factors.device}; convert one of them"
            )
        if not bool(factors.isfinite().all()):
            raise ManifoldError("SampledMetric: factors hold NaN or infinity; leave out those anchors")
        if not (damping >= 0 and math.isfinite(damping)):
            raise ManifoldError(f"SampledMetric: damping is {damping}; it must be a finite number ≥ 0")
        if bandwidth is None:
            bandwidth = _spacing(anchors)
        if not (bandwidth > 0 and math.isfinite(bandwidth)):
            raise ManifoldError(f"SampledMetric: bandwidth is {bandwidth}; it must be a finite number > 0")
        with torch.inference_mode(False):  # they are kept, and used for gradients later
            self.register_buffer("anchors", widened(anchors.detach()).clone())
            self.register_buffer("factors", widened(factors.detach()).clone())
        self.damping, self.bandwidth = float(damping), float(bandwidth)

    def _apply(self, fn: Any, *args: Any, **options: Any) -> Any:
        return super()._apply(in_single(fn), *args, **options)

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file must hold to make the metric again."""
        values = {"damping": self.damping, "bandwidth": self.bandwidth}
        return values, {"anchors": self.anchors, "factors": self.factors}

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "SampledMetric":
        """Makes the metric again from what `describe` gave."""
        missing = sorted({"anchors", "factors"} - tensors.keys())
        if missing:
            raise ManifoldError(f"SampledMetric: the tensors {missing} are missing; the file is not whole")
        return cls(tensors["anchors"], tensors["factors"], **values)

    @property
    def width(self) -> int:
        """The dimension of the space of points."""
        return self.anchors.shape[1]

    def weights(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch m"]:
        """How much each anchor counts at x."""
        self._check_width(x)
        anchors = self.anchors.to(x)
        centre = anchors.mean(0)
        place, anchors = x - centre, anchors - centre
        # ‖x‖² is the same for all anchors: the softmax does not see it.
        scores = place @ anchors.mT - anchors.square().sum(-1) / 2
        return (scores / self.bandwidth**2).softmax(-1)

    def images(self, u: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch m r"]:
        """Fᵢ u for all anchors."""
        self._check_width(u)
        m, r, _ = self.factors.shape
        return (u @ self.factors.to(u).flatten(0, 1).mT).unflatten(-1, (m, r))

    def inner(
        self, x: Float[Tensor, "*batch D"], u: Float[Tensor, "*batch D"], v: Float[Tensor, "*batch D"]
    ) -> Float[Tensor, "*batch"]:
        """⟨u, g(x) v⟩."""
        left = self.images(u)
        right = left if v is u else self.images(v)
        each = (left * right).sum(-1)
        return (self.weights(x) * each).sum(-1) + self.damping * (u * v).sum(-1)

    def product(self, x: Float[Tensor, "*#batch D"], u: Float[Tensor, "*#batch D"]) -> Tensor:
        """The vector g(x) u."""
        return self._pulled(self.weights(x), u) + self.damping * u

    def gradient(self, x: Float[Tensor, "*batch D"], u: Float[Tensor, "*batch D"]) -> Tensor:
        """The derivative of ⟨u, g(x) u⟩ in x: Σ wᵢ ‖Fᵢ u‖² (aᵢ − ā) / h² with the mean anchor ā = Σ wᵢ aᵢ."""
        weights = self.weights(x)
        each = weights * self.images(u).square().sum(-1)
        anchors = self.anchors.to(x)
        pulled = each @ anchors - each.sum(-1, keepdim=True) * (weights @ anchors)
        return pulled / self.bandwidth**2

    def changed(self, x: Float[Tensor, "*batch D"], u: Float[Tensor, "*batch D"]) -> Tensor:
        """The vector (D_u g)(x) u, by which g u changes on the way along u."""
        weights, anchors = self.weights(x), self.anchors.to(x)
        along = (u @ anchors.mT) - (u * (weights @ anchors)).sum(-1, keepdim=True)
        return self._pulled(weights * along / self.bandwidth**2, u)

    def slope(self, path: Float[Tensor, "b points D"]) -> Float[Tensor, "b inner D"]:
        """The derivative of ½ Σ ⟨Δ, g(m) Δ⟩ in the inner points of chains, m being the middles."""
        steps, middle = path[:, 1:] - path[:, :-1], (path[:, 1:] + path[:, :-1]) / 2
        force, drift = self.product(middle, steps), self.gradient(middle, steps) / 4
        return force[:, :-1] - force[:, 1:] + drift[:, :-1] + drift[:, 1:]

    def acceleration(
        self,
        manifold: "LearnedManifold",
        x: Float[Tensor, "*batch D"],
        tangent: Float[Tensor, "*batch D d"],
        u: Float[Tensor, "*batch D"],
    ) -> Float[Tensor, "*batch D"]:
        """The tangent acceleration of the geodesic of this metric through x along u.

        A in the tangent space with Tᵀ g a = Tᵀ (½ ∇⟨u, g u⟩ − (D_u g) u − g II(u, u)).
        """
        bend = manifold.second_fundamental_form(x, u, u)
        force = self.gradient(x, u) / 2 - self.changed(x, u) - self.product(x, bend)
        return self.solve(x, tangent, force)

    def solve(
        self,
        x: Float[Tensor, "*batch D"],
        tangent: Float[Tensor, "*batch D d"],
        covector: Float[Tensor, "*batch D"],
    ) -> Float[Tensor, "*batch D"]:
        """The tangent vector a with ⟨v, g a⟩ = ⟨v, covector⟩ for all tangent v.

        Raises:
            ManifoldError: the metric is singular on the tangent space.
        """
        matrix = tangent.mT @ self.product(x[..., None, :], tangent.mT).mT
        factor, failed = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
        if bool((failed != 0).any()):
            raise ManifoldError(
                f"SampledMetric: the metric is singular in {int((failed != 0).sum())} of {failed.numel()} "
                "tangent spaces; give SampledMetric the argument damping, which adds ε⟨u, v⟩"
            )
        right = tangent.mT @ covector.expand(x.shape)[..., None]
        return (tangent @ torch.cholesky_solve(right, factor))[..., 0]

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.width,):
            raise ManifoldError(
                f"SampledMetric: a vector has shape {tuple(x.shape)}; the metric holds for vectors of "
                f"{self.width}"
            )

    def _pulled(self, weights: Tensor, u: Tensor) -> Tensor:
        weighed = self.images(u) * weights[..., None]
        return weighed.flatten(-2) @ self.factors.to(u).flatten(0, 1)


def _spacing(anchors: Tensor) -> float:
    if len(anchors) < 2:
        return 1.0
    found = nearest_neighbours(widened(anchors), neighbors=1).distances
    apart = found[found > 0]
    if not len(apart):
        raise ManifoldError("SampledMetric: all anchors are at the same place; give one, or a bandwidth")
    return float(apart.median())
