"""The pulled-back metric at points: inner products, gradients, Hessians; and the map behind it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import frobenius_norm, safe_sqrt
from manifolds.errors import ManifoldError
from manifolds.forward_mode import WrittenOut
from manifolds.operations import operation
from manifolds.pulled_back.chart import Chart, item_of, readable
from manifolds.pulled_back.derivatives import Mode
from manifolds.pulled_back.local import MetricAt
from manifolds.pulled_back.output_metrics import OutputMetric, OutputMetricLike, read_metric
from manifolds.pulled_back.paths import Embedding


class PulledMetric(Chart):
    """A map, the metric on its outputs, and what they say at single points; see `Pullback`."""

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        output_metric: OutputMetricLike | OutputMetric = None,
        *,
        ndim: int = 1,
        damping: float = 0.0,
        derivatives: Mode = "forward",
        steps: int = 32,
    ) -> None:
        super().__init__()
        if not callable(f):
            raise ManifoldError(f"Pullback: f is {f!r}; it must be a function of points (items, *point)")
        if ndim < 1:
            raise ManifoldError(f"Pullback: ndim is {ndim}; a point has at least one dimension")
        if not (damping >= 0 and math.isfinite(damping)):
            raise ManifoldError(f"Pullback: damping is {damping}; it must be a finite number ≥ 0")
        if derivatives not in ("forward", "reverse"):
            raise ManifoldError(
                f"Pullback: derivatives is {derivatives!r}; it must be 'forward' or 'reverse'"
            )
        self.f, self.output_metric = f, read_metric(output_metric)
        self.ndim, self.damping, self.derivatives = ndim, float(damping), derivatives
        self.steps = counted("Pullback", "steps", steps)
        self.name = f"Pullback({self.output_metric.name})"

    # The metric

    @operation
    def metric_vector(self, x: Tensor, v: Tensor) -> Tensor:
        """The product G v = Jᵀ M J v + ε v, of the shape of the points."""
        (a, b), shape = self._flat("metric_vector", x, v)
        return self._finite("metric_vector", MetricAt(self.geometry(), a).vector(b), shape).reshape(shape)

    @operation
    def metric(self, x: Tensor) -> Float[Tensor, "*batch n n"]:
        """The matrix G over the flattened coordinates of the points; n² entries each, so for small points."""
        (a,), shape = self._flat("metric", x)
        found = self._finite("metric", MetricAt(self.geometry(), a).matrix(), shape)
        return found.reshape(*self._batch(shape), *found.shape[1:])

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """⟨u, v⟩ = ⟨J u, M J v⟩ + ε ⟨u, v⟩ (*batch)."""
        (a, b, c), shape = self._flat("inner", x, u, u if v is None else v)
        at = MetricAt(self.geometry(), a)
        left = at.push(b)
        right = left if v is None else at.push(c)
        found = (left * at.embedding.weigh(at.at.value, right)).sum(-1)
        return self._over_items(self._finite("inner", found, shape), shape, keepdim)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """The length of J u in the output metric (*batch)."""
        (a, b), shape = self._flat("norm", x, u)
        at = MetricAt(self.geometry(), a)
        pushed = at.push(b)
        if at.embedding.weight is None:
            found = frobenius_norm(pushed, 1)
        else:
            found = safe_sqrt((pushed * at.embedding.weigh(at.at.value, pushed)).sum(-1))
        return self._over_items(self._finite("norm", found, shape), shape, keepdim)

    def egrad2rgrad(self, x: Tensor, g: Tensor) -> Tensor:
        """The Riemannian gradient G⁻¹ g."""
        (a, b), shape = self._flat("egrad2rgrad", x, g)
        return self._regular("egrad2rgrad", MetricAt(self.geometry(), a).solve(b), shape).reshape(shape)

    def ehess2rhess(self, x: Tensor, g: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """The Riemannian Hessian applied to u: G⁻¹ (h − ⟨G⁻¹ g, Γ(u, ·)⟩)."""
        (a, b, c, d), shape = self._flat("ehess2rhess", x, g, h, u)
        at = MetricAt(self.geometry(), a)
        found = at.solve(c - at.christoffel_adjoint(at.solve(b), d))
        return self._regular("ehess2rhess", found, shape).reshape(shape)

    @operation
    def christoffel(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The vector Γ(u, v), of components Γᵏᵢⱼ uⁱ vʲ, by which a geodesic bends; v = u if not given.

        Formula: Γ(u, v) = J⁺ D²f(u, v) with J⁺ = G⁻¹ Jᵀ for Euclidean outputs.
        """
        (a, b, c), shape = self._flat("christoffel", x, u, u if v is None else v)
        at = MetricAt(self.geometry(), a)
        return self._regular("christoffel", at.solve(at.christoffel(b, c)), shape).reshape(shape)

    # The map

    def geometry(self, *, damped: bool = True) -> Embedding:
        """The map into the space where the metric is measured, flattened: what all else is computed from.

        It is φ∘f for an output metric with an isometric embedding φ, else f with the products M(y) v; with
        damping, √ε x stands after it.
        """
        metric, root = self.output_metric, self.damping**0.5 if damped else 0.0
        shapes: list[torch.Size] = []

        def function(x: Tensor) -> Tensor:
            y = self._outputs(x)
            shapes[:] = [y.shape[1:]]
            z = (metric.embed(y) if metric.embedded else y).flatten(1)
            return torch.cat([z, root * x.flatten(1)], 1) if root else z

        def weight(z: Tensor, v: Tensor) -> Tensor:
            out = shapes[0]
            count = out.numel()
            found = metric.vector(z[:, :count].reshape(-1, *out), v[:, :count].reshape(-1, *out)).flatten(1)
            return torch.cat([found, v[:, count:]], 1) if root else found

        return Embedding(function, None if metric.embedded else weight, self.derivatives)

    def _written(self, x: Tensor) -> Any:
        """The map at x, with norm layers written out, as second derivatives need."""
        with WrittenOut():
            return self.f(x)

    def _outputs(self, x: Float[Tensor, "items *point"]) -> Float[Tensor, "items *out"]:
        y = self._written(x)
        if not isinstance(y, Tensor):
            raise ManifoldError(
                f"{self.name}: f gave {type(y).__name__}; it must return one tensor (items, *out)"
            )
        if y.ndim < 2 or y.shape[0] != x.shape[0]:
            raise ManifoldError(
                f"{self.name}: f took points of shape {tuple(x.shape)} and gave {tuple(y.shape)}; it must "
                "give "
                f"({x.shape[0]}, *out), one output an item: wrap a function of one point in torch.vmap"
            )
        if not y.is_floating_point():
            raise ManifoldError(
                f"{self.name}: f gave dtype {y.dtype}; outputs are real floating-point tensors"
            )
        return y

    def _check_items(self, operation: str, x: Tensor, shape: torch.Size) -> None:
        """Refuses a map that is random or mixes items: another first one must leave the others' outputs."""
        if x.shape[0] < 2 or not readable(x):
            return
        with torch.no_grad():
            point = x.detach()
            spread = (point.amax() - point.amin()).clamp_min(1)
            other = torch.cat([point[:1] + spread, point[1:]])
            before, after = self._outputs(point)[1:], self._outputs(other)[1:]
            scale = before.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
            change = float((after - before).abs().amax() / scale)
        if change > 1e-3:
            raise ManifoldError(
                f"{self.name}.{operation}: f mixes the items of a batch, or is random (another first item "
                "changes the "
                f"others' outputs by {change:.1g}); put batch normalisation and dropout into evaluation mode"
            )

    def _finite(self, operation: str, found: Tensor, shape: torch.Size) -> Tensor:
        if readable(found):
            flags = ~found.detach().isfinite().reshape(found.shape[0], -1).all(-1)
            if bool(flags.any()):
                batch = self._batch(shape)
                where = item_of(flags, batch) if flags.numel() == batch.numel() else ""
                raise ManifoldError(
                    f"{self.name}.{operation}: f, or its derivative, is NaN or infinite{where}; look at f "
                    "there"
                )
        return found

    def _regular(self, operation: str, found: Tensor, shape: torch.Size) -> Tensor:
        if readable(found):
            flags = ~found.detach().isfinite().reshape(found.shape[0], -1).all(-1)
            if bool(flags.any()):
                raise ManifoldError(
                    f"{self.name}.{operation}: the metric is singular or f not "
                    f"finite{item_of(flags, self._batch(shape))}: "
                    "f loses rank there; give the argument damping, which adds ε⟨u, v⟩"
                )
        return found


def counted(owner: str, name: str, count: int) -> int:
    """The number, if it is a positive integer."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ManifoldError(f"{owner}: {name} is {count!r}; it must be an integer of at least 1")
    return count
