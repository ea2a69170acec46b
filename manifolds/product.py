"""Products of manifolds, packed into one vector."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from manifolds.base import Manifold, frobenius_norm, plain, safe_sqrt
from manifolds.errors import ManifoldError, MissingOperationError


class Product(Manifold):
    """Tuples of points, one of each manifold, with the sum of the metrics, Σ wᵢ ⟨uᵢ, vᵢ⟩.

    A point is one vector: the entries of the factors' points, one after another, in the last dimension, as in
    geoopt's `ProductManifold`. `pack_point` makes it and `unpack_tensor` takes it apart. A factor may be any
    `geoopt.Manifold`, ours or not; an operation that a factor lacks raises and names the factor.

    Args:
        manifolds_with_shapes: pairs of a manifold and the shape of its point. A shape with more dimensions
            than a point of the manifold counts as several points.
        weights: the factors wᵢ of the metrics; all one if not given.

    Raises:
        ManifoldError: no factor, a shape that does not fit, or a weight that is not positive.

    Example:
        >>> import torch
        >>> from manifolds import Sphere
        >>> torus = Product((Sphere(), 2), (Sphere(), 2))
        >>> x = torus.pack_point(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        >>> x
        tensor([1., 0., 0., 1.])
        >>> torus.take_submanifold_value(x, 1)
        tensor([0., 1.])
    """

    ndim = 1

    def __init__(
        self,
        *manifolds_with_shapes: tuple[geoopt.Manifold, int | Sequence[int]],
        weights: Sequence[float | int] | None = None,
    ) -> None:
        super().__init__()
        if not manifolds_with_shapes:
            raise ManifoldError("Product: it has no factor; give pairs of a manifold and a shape")
        self.shapes: list[tuple[int, ...]] = []
        self.slices: list[slice] = []
        start = 0
        for position, (manifold, size) in enumerate(manifolds_with_shapes):
            shape = (size,) if isinstance(size, int) else tuple(size)
            ok, reason = manifold._check_shape(shape, "its shape")
            if not ok:
                raise ManifoldError(f"Product: factor {position} ({manifold.name}): {reason}")
            self.shapes.append(shape)
            self.slices.append(slice(start, start + math.prod(shape)))
            start += math.prod(shape)
        self.manifolds = nn.ModuleList(manifold for manifold, _ in manifolds_with_shapes)
        self.weights = tuple(float(weight) for weight in weights or [1.0] * len(self.shapes))
        if len(self.weights) != len(self.shapes) or not all(0 < weight < math.inf for weight in self.weights):
            raise ManifoldError(
                f"Product: weights are {self.weights}; give {len(self.shapes)} positive numbers, one a factor"
            )
        self.n_elements = start
        self.n_manifolds = len(self.shapes)
        self.example_shape = (start,)
        self.name = f"Product({' × '.join(str(manifold.name) for manifold in self.manifolds)})"
        order = min(_order(manifold) for manifold in self.manifolds)
        self.retractions = {"product": order}  # type: ignore[misc]
        claims = [frozenset(getattr(manifold, "isometric", ())) for manifold in self.manifolds]
        self.isometric = frozenset.intersection(*claims)  # type: ignore[misc]
        self.reversible = all(bool(manifold.reversible) for manifold in self.manifolds)
        self.metric_is_ambient = all(getattr(m, "metric_is_ambient", True) for m in self.manifolds)

    # Packing

    def pack_point(self, *tensors: Tensor) -> Tensor:
        """The packed point (*batch, n_elements) of one tensor (*batch, *shape) for each factor."""
        if len(tensors) != self.n_manifolds:
            raise ManifoldError(
                f"{self.name}.pack_point: {self.n_manifolds} tensors go in, got {len(tensors)}"
            )
        flat = []
        for position, (tensor, shape) in enumerate(zip(tensors, self.shapes, strict=True)):
            lead = tensor.ndim - len(shape)
            if lead < 0 or tuple(tensor.shape[lead:]) != shape:
                raise ManifoldError(
                    f"{self.name}.pack_point: {self._label(position)} has shape {tuple(tensor.shape)}, "
                    f"which does not end in {shape}"
                )
            flat.append(plain(tensor).reshape(*tensor.shape[:lead], math.prod(shape)))
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in flat))
        return torch.cat([part.expand(*batch, part.shape[-1]) for part in flat], -1)

    def unpack_tensor(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The factors' tensors (*batch, *shape) of a packed one; undoes `pack_point`."""
        return tuple(self.take_submanifold_value(tensor, position) for position in range(self.n_manifolds))

    def take_submanifold_value(self, x: Tensor, i: int, reshape: bool = True) -> Tensor:
        """The part of factor i, (*batch, *shape), or (*batch, entries) with `reshape=False`."""
        part = plain(x)[..., self.slices[i]]
        return part.reshape((*part.shape[:-1], *self.shapes[i])) if reshape else part

    # What it says of itself

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The sum of the factors' dimensions."""
        total = 0
        for position, manifold in enumerate(self.manifolds):
            shape = self.shapes[position]
            count = torch.Size(shape[: len(shape) - int(manifold.ndim)]).numel()  # type: ignore[arg-type]
            total += count * int(self._of(position, "dimension")(shape))
        return total

    def embedding(self, x: Tensor) -> Tensor:
        """The factors' embeddings, one after another."""
        parts = []
        for manifold, part in self._parts(x):
            place = manifold.embedding(part) if hasattr(manifold, "embedding") else part
            parts.append(plain(place).reshape(*x.shape[:-1], -1))
        return torch.cat(parts, -1)

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """The factors' defects, named by factor; for geoopt's manifolds, how far `projx` moves the point."""
        found: dict[str, Tensor] = {}
        for position, (manifold, part) in enumerate(self._parts(x)):
            if isinstance(manifold, Manifold):
                defects = manifold.point_defects(part)
            else:
                defects = {"projx(x) = x": _apart(manifold, manifold.projx(part), part)}
            found.update({f"{self._label(position)}: {key}": self._worst(v, x) for key, v in defects.items()})
        return found

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The factors' defects, named by factor; for geoopt's manifolds, how far `proju` moves the vector."""
        found: dict[str, Tensor] = {}
        lead = torch.broadcast_shapes(x.shape, u.shape)
        for position, (manifold, part, vector) in enumerate(self._parts(x, u)):
            if isinstance(manifold, Manifold):
                defects = manifold.tangent_defects(part, vector)
            else:
                defects = {"proju(x, u) = u": _apart(manifold, manifold.proju(part, vector), vector)}
            found.update(
                {f"{self._label(position)}: {k}": self._worst(v, u.expand(lead)) for k, v in defects.items()}
            )
        return found

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A random point of each factor. The last number of the size is `n_elements`."""
        given = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        shape = tuple(int(number) for number in given)  # type: ignore[arg-type]
        ok, reason = self._check_shape(shape, "size")
        if not ok:
            raise ManifoldError(f"{self.name}.random: {reason}")
        parts = []
        for manifold, inner in zip(self.manifolds, self.shapes, strict=True):
            whole = (*shape[:-1], *inner)
            if isinstance(manifold, Manifold):
                parts.append(manifold.random(*whole, dtype=dtype, device=device, generator=generator))
            else:
                parts.append(_foreign_random(manifold, whole, dtype, device, generator))
        return self._point(self.pack_point(*parts))

    # Operations, factor by factor

    def projx(self, x: Tensor) -> Tensor:
        """Every factor's projection."""
        return self._each("projx", x)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Every factor's projection."""
        return self._each("proju", x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Every factor's retraction; its order is the lowest of theirs."""
        return self._each("retr", x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Every factor's exponential."""
        return self._each("expmap", x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Every factor's logarithm."""
        return self._each("logmap", x, y)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Every factor's transport."""
        return self._each("transp", x, y, v)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Every factor's transport along its retraction."""
        return self._each("transp_follow_retr", x, u, v)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Every factor's transport along its geodesic."""
        return self._each("transp_follow_expmap", x, u, v)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Every factor's retraction and transport along it."""
        return self._pairs("retr_transp", x, u, v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Every factor's exponential and transport along it."""
        return self._pairs("expmap_transp", x, u, v)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """The sum of the factors' inner products, each times its weight (*batch)."""
        v = u if v is None else v
        parts = [manifold.inner(p, a, b, keepdim=True) for manifold, p, a, b in self._parts(x, u, v)]
        return self._total(parts, torch.broadcast_shapes(x.shape, u.shape, v.shape), keepdim)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """The root of Σ wᵢ ‖uᵢ‖² (*batch)."""
        return safe_sqrt(self.inner(x, u, keepdim=keepdim))

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The root of the sum of the squared distances of the parts, each times its weight (*batch)."""
        batch = torch.broadcast_shapes(x.shape, y.shape)[:-1]
        parts = [
            manifold.dist(p, q, keepdim=True).reshape(*batch, -1) * weight**0.5
            for (manifold, p, q), weight in zip(self._parts(x, y), self.weights, strict=True)
        ]
        return frobenius_norm(torch.cat(parts, -1), 1, keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The sum of the squared distances of the parts, each times its weight (*batch)."""
        parts = [manifold.dist2(p, q, keepdim=True) for manifold, p, q in self._parts(x, y)]
        return self._total(parts, torch.broadcast_shapes(x.shape, y.shape), keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Each factor's own inner product, spread over its entries, as Adam wants it."""
        v = u if v is None else v
        parts = []
        for (manifold, p, a, b), weight in zip(self._parts(x, u, v), self.weights, strict=True):
            shape = torch.broadcast_shapes(p.shape, a.shape, b.shape)
            parts.append(weight * manifold.component_inner(p, a, b).expand(shape))
        return self.pack_point(*parts)

    def egrad2rgrad(self, x: Tensor, g: Tensor) -> Tensor:
        """Every factor's gradient, divided by its weight."""
        return self._each("egrad2rgrad", x, g, unweigh=True)

    def ehess2rhess(self, x: Tensor, g: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """Every factor's Hessian, divided by its weight."""
        return self._each("ehess2rhess", x, g, h, u, unweigh=True)

    def normal(self, x: Tensor, a: Tensor) -> Tensor:
        """The part of a vector that is normal to the manifold, factor by factor."""
        return self._each("normal", x, a)

    def weingarten(self, x: Tensor, u: Tensor, n: Tensor) -> Tensor:
        """Every factor's Weingarten map."""
        return self._each("weingarten", x, u, n)

    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Every factor's second fundamental form; the weights do not change it."""
        return self._each("second_fundamental_form", x, u, v)

    # Help

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        if len(shape) >= 1 and shape[-1] == self.n_elements:
            return True, None
        return False, f"{name} has shape {tuple(shape)}; its last dimension holds {self.n_elements} entries"

    def _parts(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        for position, manifold in enumerate(self.manifolds):
            yield manifold, *(self.take_submanifold_value(tensor, position) for tensor in tensors)

    def _of(self, position: int, name: str) -> Callable[..., Any]:
        found = getattr(self.manifolds[position], name, None)
        if found is None:
            raise MissingOperationError(f"{self.name}: {self._label(position)} has no {name}")
        return found

    def _run(self, position: int, name: str, *tensors: Tensor) -> Any:
        try:
            return self._of(position, name)(*tensors)
        except NotImplementedError as missing:
            if isinstance(missing, ManifoldError) and self.name in str(missing):
                raise
            raise MissingOperationError(f"{self.name}: {self._label(position)} has no {name}") from missing

    def _each(self, name: str, *tensors: Tensor, unweigh: bool = False) -> Tensor:
        found = []
        for position, weight in enumerate(self.weights):
            parts = [self.take_submanifold_value(tensor, position) for tensor in tensors]
            result = self._run(position, name, *parts)
            found.append(result / weight if unweigh and weight != 1 else result)
        return self.pack_point(*found)

    def _pairs(self, name: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            self._run(position, name, *(self.take_submanifold_value(tensor, position) for tensor in tensors))
            for position in range(self.n_manifolds)
        ]
        points, vectors = zip(*found, strict=True)
        return self.pack_point(*points), self.pack_point(*vectors)

    def _total(self, parts: list[Tensor], shape: torch.Size, keepdim: bool) -> Tensor:
        total = torch.stack(
            [w * part.reshape(*shape[:-1], -1).sum(-1) for part, w in zip(parts, self.weights, strict=True)]
        ).sum(0)
        return total.unsqueeze(-1) if keepdim else total

    def _worst(self, defect: Tensor, x: Tensor) -> Tensor:
        return defect.reshape(*x.shape[:-1], -1).amax(-1)

    def _label(self, position: int) -> str:
        return f"factor {position} ({self.manifolds[position].name})"


def _order(manifold: geoopt.Manifold) -> int:
    """The order of what `retr` is; the first for a manifold that does not say."""
    orders: dict[str, int] = getattr(manifold, "retractions", {})
    chosen = getattr(manifold, "retraction", None)
    return orders[chosen] if chosen in orders else min(orders.values(), default=1)


def _apart(manifold: geoopt.Manifold, found: Tensor, expected: Tensor) -> Tensor:
    size = frobenius_norm(expected, manifold.ndim)
    return frobenius_norm(found - expected, manifold.ndim) / torch.where(size > 0, size, 1.0)


def _foreign_random(
    manifold: geoopt.Manifold,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """A random point of a manifold that knows no generator, drawn under a seed from ours."""
    if generator is None:
        return plain(manifold.random(*shape)).to(device=device, dtype=dtype)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return plain(manifold.random(*shape)).to(device=device, dtype=dtype)
