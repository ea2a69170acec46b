"""Metrics on the outputs of a map: Euclidean, Fisher's of two distributions, or a caller's own.

Two things describe a metric. `embed` maps outputs isometrically into a Euclidean space, where there is such a
map in closed form: then everything is a matter of that composed map alone. Otherwise `vector` gives products
M(y) v.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.errors import ManifoldError

MetricVector = Callable[[Tensor, Tensor], Tensor]
"""From outputs y and vectors v, both (*batch, *out), to M(y) v of the same shape; linear, symmetric, M ≥
0."""

OutputMetricLike = str | MetricVector | None


class OutputMetric:
    """A Riemannian metric on outputs (*batch, *out).

    Attributes:
        name: what messages call it.
        embedded: whether `embed` is an isometry into a Euclidean space.
    """

    name: str = "a metric"
    embedded: bool = False

    def embed(self, y: Tensor) -> Tensor:
        """The image of outputs under an isometry into a Euclidean space, of the same leading dimensions."""
        raise ManifoldError(f"the output metric {self.name} has no Euclidean embedding in closed form")

    def vector(self, y: Tensor, v: Tensor) -> Tensor:
        """The product M(y) v."""
        raise NotImplementedError

    def normal(self, embedded: Tensor, a: Tensor) -> Tensor:
        """The part of an acceleration (*batch, *out) in the embedding that is tangent to its image."""
        return a

    def __repr__(self) -> str:
        return self.name


class Euclidean(OutputMetric):
    """M = I: the metric of the outputs' coordinates."""

    name = "euclidean"
    embedded = True

    def embed(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The outputs themselves."""
        return y

    def vector(self, y: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The vector itself."""
        return v


class Categorical(OutputMetric):
    """The Fisher metric of p = softmax(y) over the last dimension, for logits y: M = diag(p) − p pᵀ.

    y ↦ 2 √p is isometric onto a part of the sphere of radius 2: with dz = √p (dy − pᵀdy), ‖dz‖² = dyᵀ M dy.
    It is computed as 2 exp(log_softmax(y) / 2), which neither overflows nor loses the small probabilities.
    Further dimensions of the output, tokens say, are independent distributions whose metrics add.

    Source: Amari, Information Geometry (2016), section 2.5; pulled back through networks by Arvanitidis et
    al., "Pulling back information geometry" (2022).
    """

    name = "fisher"
    embedded = True

    def embed(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """2 √softmax(y)."""
        return 2 * torch.exp(torch.log_softmax(y, -1) / 2)

    def vector(self, y: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """P (v − pᵀ v)."""
        p = torch.softmax(y, -1)
        return p * (v - (p * v).sum(-1, keepdim=True))

    def normal(self, embedded: Float[Tensor, "..."], a: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The acceleration without its radial part: the sphere's own curvature is none of the map's."""
        return a - (embedded * a).sum(-1, keepdim=True) / 4 * embedded


class Gaussian(OutputMetric):
    """The Fisher metric of normal distributions given by their means and log standard deviations.

    The last dimension holds n means μ and then n log standard deviations s: M = diag(exp(−2s), 2), because
    the Fisher metric is dμ² / σ² + 2 dσ² / σ² and ds = dσ / σ.
    """

    name = "gaussian"

    def vector(self, y: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(exp(−2s) v_μ, 2 v_s)."""
        if y.shape[-1] % 2:
            raise ManifoldError(
                f"Pullback: the output metric gaussian got {y.shape[-1]} outputs; give n means and n log "
                "standard "
                "deviations along the last dimension"
            )
        _, log_deviation = y.chunk(2, -1)
        of_mean, of_deviation = v.chunk(2, -1)
        return torch.cat([torch.exp(-2 * log_deviation) * of_mean, 2 * of_deviation], -1)


class Custom(OutputMetric):
    """A metric from a caller's function (y, v) ↦ M(y) v, both of shape (*batch, *out)."""

    def __init__(self, function: MetricVector) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def vector(self, y: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the function says."""
        found = self.function(y, v)
        if not isinstance(found, Tensor) or found.shape != v.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ManifoldError(
                f"Pullback: the output metric {self.name} gave {got} for vectors of shape {tuple(v.shape)}; "
                "it must return M(y) v, of the shape of v"
            )
        return found


def read_metric(metric: OutputMetricLike | OutputMetric) -> OutputMetric:
    """The metric that an argument names.

    Raises:
        ManifoldError: an unknown name, or neither a name nor a function.
    """
    named = {"euclidean": Euclidean, "fisher": Categorical, "categorical": Categorical, "gaussian": Gaussian}
    if metric is None:
        return Euclidean()
    if isinstance(metric, OutputMetric):
        return metric
    if isinstance(metric, str) and metric in named:
        return named[metric]()
    if callable(metric):
        return Custom(metric)
    raise ManifoldError(
        f"Pullback: output_metric is {metric!r}; it is None, one of {', '.join(named)}, or a function (y, "
        "v) -> M(y) v"
    )
