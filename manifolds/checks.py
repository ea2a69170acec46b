"""All properties of a manifold in one table."""

from collections.abc import Callable
from dataclasses import dataclass

import geoopt
import pandas as pd
import torch
from torch import Tensor

from manifolds import properties, transports
from manifolds.base import plain
from manifolds.errors import ManifoldError
from manifolds.measurements import Measurement
from manifolds.operations import unchecked

PROPERTIES: tuple[Callable[..., list[Measurement]], ...] = (
    properties.projection_is_idempotent,
    properties.projection_is_self_adjoint,
    properties.tangent_dimension,
    properties.zero_step_is_identity,
    properties.retractions_are_first_order,
    properties.retractions_keep_their_order,
    properties.exponential_is_geodesic,
    properties.logarithm_inverts_exponential,
    properties.small_distances_are_kept,
    transports.transport_keeps_its_promises,
    properties.gradient_and_hessian,
    properties.batch_equals_loop,
)
"""The functions behind `check`, in the order of the table."""

SEED = 7_340_129
"""Of the default generator; odd, as vectors drawn with the seed of the points would be these points again."""


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        manifold: the manifold's name.
        shape: the shape of the points that were tried.
        measurements: one for each property.
    """

    manifold: str
    shape: tuple[int, ...]
    measurements: tuple[Measurement, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing that could be measured fails."""
        return all(each.passed is not False for each in self.measurements)

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The measurements that fail."""
        return tuple(each for each in self.measurements if each.passed is False)

    @property
    def table(self) -> pd.DataFrame:
        """One row a property; `passed` is None where it is not available or not claimed."""
        rows = [(m.property, m.value, m.expected, m.passed, m.note) for m in self.measurements]
        names = ["property", "measured", "expected", "passed", "note"]
        table = pd.DataFrame(rows, columns=names)
        return table.astype({"measured": "float64", "passed": object})

    def __str__(self) -> str:
        said = "holds" if self.passed else f"fails {len(self.failures)}"
        head = f"{self.manifold}, points of shape {self.shape}: {said} of {len(self.measurements)} properties"
        shown = self.table.to_string(index=False, float_format=lambda value: f"{value:.3g}", na_rep="–")
        return f"{head}\n{shown}"

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False, float_format=lambda value: f"{value:.3g}", na_rep="–"))


def check(
    manifold: geoopt.Manifold,
    x: Tensor | None = None,
    *,
    size: int | tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
) -> Check:
    """Measures whether a manifold, ours or anyone's, does what it says.

    Projections, the dimension, the order of every retraction, exponential and logarithm, transports,
    gradient and Hessian, and batches, in float64. Same generator, same numbers. What the manifold lacks is
    in the table with `passed` None and the reason.

    Args:
        manifold: any `geoopt.Manifold`.
        x: points (*batch, *point) to try; drawn by `manifold.random` if not given.
        size: the shape of the points to draw, with or without batch dimensions; two points of the manifold's
            `example_shape`, or of a small shape that its `random` takes, if not given.
        generator: where random vectors come from; one of a fixed seed if not given.

    Raises:
        ManifoldError: no point can be drawn, or the points are complex or not on the manifold.

    Example:
        >>> import geoopt
        >>> check(geoopt.EuclideanStiefel(), size=(5, 3)).passed
        True
        >>> wrong = check(geoopt.Stiefel(), size=(5, 3))
        >>> wrong.failures[0].property
        'proju twice is proju'
    """
    generator = generator if generator is not None else torch.Generator().manual_seed(SEED)
    point = _points(manifold, x, size, generator)
    with unchecked():
        found = [row for measure in PROPERTIES for row in measure(manifold, point, generator=generator)]
    return Check(str(manifold.name), tuple(point.shape), tuple(found))


def _points(
    manifold: geoopt.Manifold,
    x: Tensor | None,
    size: int | tuple[int, ...] | None,
    generator: torch.Generator,
) -> Tensor:
    if x is None:
        x = _drawn(manifold, size, generator)
    if not x.is_floating_point():
        raise ManifoldError(f"check: the points have dtype {x.dtype}; real floating-point points are checked")
    ok, reason = manifold.check_point_on_manifold(plain(x), explain=True)
    if not ok:
        raise ManifoldError(f"check: x is not on {manifold.name}: {reason}; see projx")
    return plain(manifold.projx(plain(x).detach().double()))


def _drawn(
    manifold: geoopt.Manifold, size: int | tuple[int, ...] | None, generator: torch.Generator
) -> Tensor:
    if size is not None:
        shapes = [(size,) if isinstance(size, int) else tuple(size)]
    elif (shape := getattr(manifold, "example_shape", None)) is not None:
        shapes = [(2, *shape)]
    elif (count := getattr(manifold, "n_elements", None)) is not None:
        shapes = [(2, count)]
    else:
        shapes = [(2, *each) for each in ((), (4,), (5, 3), (4, 4), (3, 3, 3)) if len(each) == manifold.ndim]
    refused = []
    for shape in shapes:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
                return plain(manifold.random(*shape))
        except (ValueError, RuntimeError) as refusal:
            refused.append(f"{shape} ({type(refusal).__name__}: {refusal})")
    raise ManifoldError(
        f"check: {manifold.name} draws no point of shape {'; '.join(refused) or 'any tried'}; give x or size"
    )
