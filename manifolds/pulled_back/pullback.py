"""The Riemannian metric that a map pulls back from its outputs to its inputs."""

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import frobenius_norm, plain, safe_sqrt
from manifolds.errors import ManifoldError
from manifolds.operations import operation
from manifolds.pulled_back.chart import item_of, readable
from manifolds.pulled_back.collocation import Exponential, Logarithm, exponential, logarithm
from manifolds.pulled_back.derivatives import Linearization, over_vectors
from manifolds.pulled_back.geodesic import Geodesic, Minimum, attach, minimize_energy, straight
from manifolds.pulled_back.image import second_form, sectional_curvature
from manifolds.pulled_back.local import MetricAt
from manifolds.pulled_back.metric import PulledMetric, counted
from manifolds.pulled_back.paths import Embedding, squared_segments
from manifolds.pulled_back.singular import SingularDirections, block_krylov


class Pullback(PulledMetric):
    """The metric ⟨u, v⟩_x = ⟨J u, M(f(x)) J v⟩ that a map f with Jacobian J = f'(x) pulls back to its inputs.

    A path between two inputs is then as long as the path of their outputs. Points are all tensors of the
    shape that f takes; only products with J and Jᵀ are made, unless a point has at most 32 coordinates, where
    J is formed.

    `f` takes points (items, *point) to (items, *out), each item by itself; several points may be handed over
    for one item of a batch, one after the other. It must be differentiable twice. It is called as it is: put
    a network in evaluation mode, and write `torch.vmap(f)` for a function of one point.

    Where f loses rank the metric is degenerate: what needs its inverse (gradient, exponential, logarithm,
    transport) raises, while products, lengths, geodesics and singular directions go on. `damping` ε adds ε⟨u,
    v⟩, which is the metric that x ↦ (f(x), √ε x) pulls back, and mends it.

    Args:
        f: the map.
        output_metric: the metric M on the outputs: None or "euclidean"; "fisher" (or "categorical") for
            logits along the last dimension, M = diag(p) − p pᵀ; "gaussian" for n means and n log standard
            deviations along the last dimension; or a function (y, v) ↦ M(y) v of tensors (items, *out),
            linear in v and symmetric.
        ndim: how many trailing dimensions make a point; 3 for a bottleneck (channels, height, width).
        damping: ε ≥ 0.
        derivatives: "forward" pushes vectors through f by forward mode; "reverse" differentiates reverse mode
            twice, for operations without forward mode (some attention kernels).
        steps: the segments of a discretised geodesic, where a call does not say otherwise.

    Raises:
        ManifoldError: an unknown metric or mode, a negative damping, ndim < 1.

    Sources: Arvanitidis, Hansen and Hauberg, "Latent space oddity" (2018); Arvanitidis et al., "Pulling back
    information geometry" (2022); Park et al., "Understanding the latent space of diffusion models through the
    lens of Riemannian geometry" (2023).

    Example:
        >>> import torch
        >>> chart = lambda x: torch.stack([x[:, 0].cos() * x[:, 1].cos(), x[:, 0].sin() * x[:, 1].cos(),
        ...                                x[:, 1].sin()], -1)
        >>> sphere = Pullback(chart)
        >>> x, y = torch.tensor([0.0, 0.8]), torch.tensor([1.5, 0.8])
        >>> sphere.dist(x, y)
        tensor(0.9897)
        >>> sphere.length(torch.stack([x, y]))
        tensor(0.9498)
    """

    retractions: ClassVar[dict[str, int]] = {"straight": 1}
    isometric: ClassVar[frozenset[str]] = frozenset()
    metric_is_ambient = True
    reversible = False

    # Geodesics by their equation

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Where the geodesic from x with velocity u is after unit time; see `exponential`.

        Raises:
            ManifoldError: the integration fails for an item: the metric is singular on the way.
        """
        return self._ended("expmap", self.exponential(x, u)).point

    def exponential(
        self, x: Tensor, u: Tensor, *, tolerance: float | None = None, max_pieces: int = 64
    ) -> Exponential:
        """The end of the geodesic from x with velocity u, its velocity there, and whether it was reached.

        Args:
            x: points (*batch, *point).
            u: velocities.
            tolerance: of the estimated error, as a part of the speed; ε^(3/4) of the dtype if not given.
            max_pieces: the most pieces that the unit of time is cut into; see `collocation.exponential`.
        """
        (a, b), shape = self._flat("exponential", x, u)
        limit = torch.finfo(a.dtype).eps ** 0.75 if tolerance is None else tolerance
        found = exponential(
            self.geometry(),
            a,
            b,
            tolerance=limit,
            max_pieces=max_pieces,
            adaptive=readable(a) and readable(b),
        )
        batch = self._batch(shape)
        return Exponential(
            found.point.reshape(shape), found.velocity.reshape(shape), found.displacement.reshape(shape),
            found.converged.reshape(batch), found.pieces.reshape(batch),
        )  # fmt: skip

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The vector carried to exp_x(u) by projection; see `transp`."""
        return self.transp(x, self.expmap(x, u), v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """exp_x(u), and the vector carried there by projection."""
        y = self.expmap(x, u)
        return y, self.transp(x, y, v)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The initial velocity of the geodesic from x to y that the straight line leads to; see `logarithm`.

        Raises:
            ManifoldError: it did not converge for an item.
        """
        found = self.logarithm(x, y)
        if bool(found.converged.all()):
            return found.vector
        where = item_of(~found.converged, found.converged.shape)
        raise ManifoldError(
            f"{self.name}.logmap: no geodesic was found{where} (largest residual "
            f"{float(found.residual.max()):.1g}); the "
            "points may be too far apart, or the metric singular: see geodesic, logarithm, or the argument "
            "damping"
        )

    def logarithm(
        self, x: Tensor, y: Tensor, *, steps: int | None = None, tolerance: float | None = None,
        max_iterations: int = 20,
    ) -> Logarithm:  # fmt: skip
        """The initial velocity of the geodesic from x to y, and whether its end is y.

        It starts at the discretised geodesic; see `collocation.logarithm`. Differentiable once.

        Args:
            x: points (*batch, *point).
            y: points.
            steps: segments of the discretised geodesic.
            tolerance: of the estimated error as a part of y − x; ε^(3/5) of the dtype if not given.
            max_iterations: Newton steps.
        """
        (a, b), shape = self._flat("logarithm", x, y)
        limit = torch.finfo(a.dtype).eps ** 0.6 if tolerance is None else tolerance
        segments = self.steps if steps is None else counted(self.name, "steps", steps)
        found = logarithm(
            self.geometry(), a, b, steps=segments, tolerance=limit, max_iterations=max_iterations
        )
        batch = self._batch(shape)
        return Logarithm(
            found.vector.reshape(shape), found.converged.reshape(batch), found.iterations.reshape(batch),
            found.residual.reshape(batch),
        )  # fmt: skip

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """The vector at y whose image is nearest to that of v at x: G(y)⁻¹ J(y)ᵀ M(f(y)) J(x) v."""
        (a, b, c), shape = self._flat("transp", x, y, v)
        embedding = self.geometry()
        at = MetricAt(embedding, b)
        found = at.solve(at.pull(MetricAt(embedding, a).push(c)))
        return self._regular("transp", found, shape).reshape(shape)

    # How the image bends

    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """II(u, v) (*batch, *out): the part of D²f(u, v) that is normal to the image of f, without damping.

        For Fisher's metric on logits it is a vector at 2 √p, tangent to that sphere: the sphere's own bending
        is left out. With another metric on the outputs the second derivative is the covariant one.
        """
        (a, b, c), shape = self._flat("second_fundamental_form", x, u, v)
        found = second_form(self.geometry(damped=False), a, b, c)
        y = self._outputs(a)
        bend = self._regular("second_fundamental_form", found, shape).reshape(y.shape)
        if self.output_metric.embedded:
            bend = self.output_metric.normal(self.output_metric.embed(y), bend)
        return bend.reshape(*self._batch(shape), *y.shape[1:])

    @operation
    def curvature(self, x: Tensor, v: Tensor) -> Tensor:
        """The curvature, in the space of outputs, of the image of the geodesic through x along v (*batch).

        Formula: κ = ‖II(v, v)‖ / ‖v‖², the normal part of the second directional derivative of f by the
        squared length of its first. It does not depend on the length of v, nor on the coordinates. A straight
        line of inputs has outputs bent by at least as much; where κ = 0 a straight edit is straight to second
        order. For the sphere of radius r it is 1/r in every direction. It is extrinsic: a cylinder has κ > 0,
        and `sectional_curvature` 0.
        """
        (a, b), shape = self._flat("curvature", x, v)
        bend = self.second_fundamental_form(a, b, b).flatten(1)
        at = MetricAt(self.geometry(damped=False), a)
        pushed = at.push(b)
        speed = (pushed * at.embedding.weigh(at.at.value, pushed)).sum(-1)
        if at.embedding.weight is None:
            size = frobenius_norm(bend, 1)
        else:
            size = safe_sqrt((bend * at.embedding.weigh(at.at.value, bend)).sum(-1))
        found = size / torch.where(speed > 0, speed, torch.nan)
        return self._over_items(self._regular("curvature", found, shape), shape, False)

    @operation
    def sectional_curvature(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The intrinsic curvature (*batch) in the plane of u and v, by Gauss's equation; with damping.

        Raises:
            ManifoldError: the output metric has no Euclidean embedding.
        """
        if not self.output_metric.embedded:
            raise ManifoldError(
                f"{self.name}.sectional_curvature: needs an output metric with a Euclidean embedding "
                "(euclidean, fisher)"
            )
        (a, b, c), shape = self._flat("sectional_curvature", x, u, v)
        found = sectional_curvature(self.geometry(), a, b, c)
        return self._over_items(self._regular("sectional_curvature", found, shape), shape, False)

    # Singular directions

    @operation
    def singular_directions(
        self,
        x: Tensor,
        k: int,
        *,
        oversampling: int = 4,
        tolerance: float | None = None,
        max_iterations: int = 50,
        generator: torch.Generator | None = None,
    ) -> SingularDirections:
        """The k directions at each point that change the output most: an edit basis.

        They are the right singular vectors of M^½ J, without damping, by randomized block Krylov iteration;
        see `block_krylov`. Repeated and zero singular values are fine.

        Args:
            x: points (*batch, *point).
            k: how many.
            oversampling: columns of the block beyond k.
            tolerance: of the angle to the exact space, in radians; the root of the dtype's precision if not
                given.
            max_iterations: blocks of products with JᵀMJ.
            generator: for the first block.

        Raises:
            ManifoldError: k is not between 1 and the number of coordinates, or the map is not finite at x.
        """
        (flat,), shape = self._flat("singular_directions", x)
        batch, point = self._batch(shape), shape[len(shape) - self.ndim :]
        size = point.numel()
        if not 1 <= k <= size:
            raise ManifoldError(
                f"{self.name}.singular_directions: k is {k}; a point of shape {tuple(point)} has {size} "
                "directions, "
                f"so that k lies between 1 and {size}"
            )
        counted(self.name, "max_iterations", max_iterations)
        self._check_items("singular_directions", flat, shape)
        limit = torch.finfo(flat.dtype).eps ** 0.5 if tolerance is None else tolerance
        embedding = self.geometry(damped=False)
        with torch.no_grad():
            at = Linearization(embedding.function, flat.detach(), embedding.mode)
            self._finite("singular_directions", at.value, shape)
            found, iterations = block_krylov(
                at, embedding.weight, k, oversampling=oversampling, tolerance=limit,
                max_iterations=max_iterations, generator=generator,
            )  # fmt: skip
        vectors = found.vectors.mT.reshape(flat.shape[0], k, *point)
        whole = Linearization(self._written, flat, embedding.mode)
        images = whole.push(vectors)
        values = found.values
        if torch.is_grad_enabled():
            weighed = over_vectors(lambda v: self.output_metric.vector(whole.value, v), images)
            values = values + _first_order(safe_sqrt((images * weighed).flatten(2).sum(-1)))
        return SingularDirections(
            values=values.reshape(*batch, k),
            vectors=vectors.reshape(*batch, k, *point),
            images=images.reshape(*batch, *images.shape[1:]),
            converged=found.converged.reshape(batch),
            angle=found.angle.reshape(batch),
            residual=found.residual.reshape(batch),
            iterations=iterations,
        )

    # Paths

    @operation
    def energy(self, path: Tensor) -> Float[Tensor, "*batch"]:
        """The energy of paths (*batch, nodes, *point), ∫₀¹ ‖γ'(t)‖² dt with the nodes evenly spaced in t.

        Discretisation: with n segments, n Σᵢ ⟨Δᵢ, M(ȳᵢ) Δᵢ⟩ where Δᵢ = f(xᵢ₊₁) − f(xᵢ) and ȳᵢ is the mean of
        the two outputs. Fisher's metric on logits is measured between the points 2 √p of a sphere. It is
        never less than `length`², and equal where all segments are equally long.
        """
        squares, batch = self._segments("energy", path)
        return (squares.shape[-1] * squares.sum(-1)).reshape(batch)

    @operation
    def length(self, path: Tensor) -> Float[Tensor, "*batch"]:
        """The length of paths (*batch, nodes, *point), the sum of the roots of `energy`'s segments."""
        squares, batch = self._segments("length", path)
        return safe_sqrt(squares).sum(-1).reshape(batch)

    @operation
    def geodesic(
        self,
        x: Tensor,
        y: Tensor,
        *,
        steps: int | None = None,
        initial: Tensor | None = None,
        tolerance: float | None = None,
        max_iterations: int = 100,
    ) -> Geodesic:
        """The path from x to y of least energy, as steps + 1 nodes; see `minimize_energy`.

        It is differentiable once in both ends and in what f holds. Nothing is raised where it does not
        converge: look at `converged`.

        Args:
            x: points (*batch, *point).
            y: points, likewise.
            steps: segments; those of the constructor if not given.
            initial: the paths (*batch, steps + 1, *point) to start at; the straight line if not given. The
                way that they lie on, where there are several, is kept.
            tolerance: of the Newton decrement, as a part of the path; the root of the dtype's precision if
                not given.
            max_iterations: steps of the minimiser.

        Raises:
            ManifoldError: ends of different shapes, an initial path that does not fit, a map that is not
                finite.
        """
        (a, b), shape = self._flat("geodesic", x, y)
        batch, point = self._batch(shape), shape[len(shape) - self.ndim :]
        steps = self.steps if steps is None else counted(self.name, "steps", steps)
        counted(self.name, "max_iterations", max_iterations)
        limit = torch.finfo(a.dtype).eps ** 0.5 if tolerance is None else tolerance
        line = straight(a.detach(), b.detach(), steps)
        if initial is not None:
            wanted = (*batch, steps + 1, *point)
            if tuple(initial.shape) != wanted:
                raise ManifoldError(
                    f"{self.name}.geodesic: initial has shape {tuple(initial.shape)}; it must be {wanted}"
                )
            inner = plain(initial).detach().reshape(line.shape)[:, 1:-1]
            line = torch.cat([line[:, :1], inner, line[:, -1:]], 1)
        self._check_items("geodesic", a, shape)
        embedding = self.geometry()
        with torch.no_grad():
            self._finite("geodesic", embedding.along(line), shape)
            found = minimize_energy(embedding, line, tolerance=limit, max_iterations=max_iterations)
        return self._geodesic(embedding, found, a, b, shape)

    def _geodesic(
        self, embedding: Embedding, found: Minimum, x: Tensor, y: Tensor, shape: torch.Size
    ) -> Geodesic:
        path = attach(embedding, found.path, x, y) if torch.is_grad_enabled() else found.path
        batch = self._batch(shape)
        squares = squared_segments(embedding, path)
        return Geodesic(
            path.reshape(*batch, path.shape[1], *shape[len(shape) - self.ndim :]),
            (squares.shape[-1] * squares.sum(-1)).reshape(batch), safe_sqrt(squares).sum(-1).reshape(batch),
            found.converged.reshape(batch), found.iterations.reshape(batch), found.residual.reshape(batch),
        )  # fmt: skip

    def _segments(self, operation: str, path: Tensor) -> tuple[Tensor, torch.Size]:
        if path.ndim < self.ndim + 1 or path.shape[path.ndim - self.ndim - 1] < 2:
            raise ManifoldError(
                f"{self.name}.{operation}: path has shape {tuple(path.shape)}; it is (*batch, nodes, "
                "*point) with at least "
                f"two nodes and points of {self.ndim} dimensions"
            )
        (flat,), shape = self._flat(operation, path)
        batch, nodes = self._batch(shape)[:-1], self._batch(shape)[-1]
        squares = squared_segments(self.geometry(), flat.unflatten(0, (-1, nodes)))
        return self._finite(operation, squares, torch.Size((*batch, *shape[len(shape) - self.ndim :]))), batch

    def _ended(self, operation: str, found: Exponential) -> Exponential:
        if not readable(found.converged):
            good = found.converged.reshape(*found.converged.shape, *(1,) * self.ndim)
            return replace(found, point=torch.where(good, found.point, torch.nan))
        if bool(found.converged.all()):
            return found
        raise ManifoldError(
            f"{self.name}.{operation}: the geodesic was not followed to its end"
            f"{item_of(~found.converged, found.converged.shape)}; the metric may be singular on the way: "
            "give damping"
        )


def _first_order(value: Tensor) -> Tensor:
    """Zero, with the derivative of the value."""
    return value - value.detach()
