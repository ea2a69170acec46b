"""How a path is fitted to samples with classes: means and their noise, coordinates, the spline, its reach."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from manifolds.base import frobenius_norm
from manifolds.cloud.closing import SAME, decide_closing
from manifolds.cloud.nearest import Table, nearest, tabulate
from manifolds.cloud.neighbours import check_points
from manifolds.cloud.splines import Curve, Sheet, curves, sheets, smooth
from manifolds.errors import ManifoldError
from manifolds.operations import widened

FAR = 10.0
"""How many times the usual distance from its class's median makes a sample an outlier."""
PRIOR = 4.0
"""How many samples the variance common to all classes counts for, beside those of a class."""
ROWS = 4096
"""How many samples are handled at a time."""
AGAIN = 3
"""How often a smoothed path is measured and fitted again."""
PAIRED = 512
"""From how many samples the number of directions of the noise is estimated."""
PLACES = 1024
"""At how many places of a sheet its reach is measured."""


@dataclass(frozen=True)
class Classes:
    """Class means and their noise, in double precision.

    Attributes:
        means: of the samples that were kept.
        counts: how many those are.
        spread: the root mean square distance from the mean; NaN of one sample.
        variance: the expected ‖error‖² of each mean; 0 where nothing is known of it.
        known: whether any class has two samples, so that something is known of the noise.
        directions: in how many directions the noise goes, (tr Σ)² / tr Σ².
        pooled: the expected ‖deviation‖² of a sample, over all classes.
        outliers: which samples were left out.
        kept: all others.
    """

    means: Tensor
    counts: Tensor
    spread: Tensor
    variance: Tensor
    known: bool
    directions: float
    pooled: float
    outliers: Tensor
    kept: Tensor


def fit_path(
    points: Float[Tensor, "n D"],
    labels: Int[Tensor, "..."],
    coordinates: Float[Tensor, "..."] | None,
    closed: bool | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `PathCloud` is made of; see `PathCloud.fit`."""
    check_points(points, "PathCloud.fit")
    if closed is not None and not isinstance(closed, (bool, np.bool_)):
        raise ManifoldError(f"PathCloud.fit: closed is {closed!r}; give True, False or None")
    points = widened(points.detach())
    count = _check_labels(points, labels)
    labels, closed = labels.long(), closed if closed is None else bool(closed)
    classes = summarise(points, labels, count)
    given = _check_coordinates(coordinates, count)
    evidence = None
    if given is not None and given.shape[1] > 1:
        if closed:
            raise ManifoldError(
                f"PathCloud.fit: closed is True and coordinates have {given.shape[1]} columns; only a curve "
                "is closed"
            )
        closed, family, places = False, sheets(given), given
    else:
        steps = _steps(classes)
        if closed is None:
            evidence = decide_closing(classes.means, classes.variance, classes.directions)
            closed = bool(evidence.closed)
        if closed and count < 3:
            raise ManifoldError(
                f"PathCloud.fit: a closed curve needs at least 3 classes, and there are {count}"
            )
        if closed:
            _check_closing_step(classes.means)
        breaks = _breaks(given, steps, closed)
        family, places = curves(breaks, closed), breaks[:count, None]
    shift = classes.means.mean(0)
    values, variance = (classes.means - shift).cpu().numpy(), classes.variance.cpu().numpy()
    least = 2.9 if closed else 0.0
    smoothing = smooth(family, values, variance, least)
    for _ in range(AGAIN if given is None and smoothing.strength > 0 else 0):
        # The steps of the smoothed path have less noise than those of the means.
        knots = smoothing.matrix @ values
        steps = np.linalg.norm(np.roll(knots, -1, 0) - knots, axis=1)
        if not (steps[: count - 1 + closed] > 1e-3 * steps.mean()).all():
            break
        breaks = _breaks(None, steps, closed)
        family, places = curves(breaks, closed), breaks[:count, None]
        smoothing = smooth(family, values, variance, least)
    fitted = torch.from_numpy(smoothing.matrix @ values).to(shift)
    frame = _span(fitted, shift)
    shape = family.through((fitted @ frame).cpu())
    shape = type(shape)(**{k: _on(v, shift) for k, v in vars(shape).items()})
    table = tabulate(shape, closed)
    within, noise, margin = _residuals(points, labels, classes, shape, table, shift, frame)
    influence = torch.zeros(0, 0, count).to(shift)
    if isinstance(family.cardinal, Curve):
        influence = (family.cardinal.pieces @ torch.from_numpy(smoothing.matrix)).to(shift)
    hull = _hull(places, shape).to(shift)
    speed = float(table.slopes.square().sum((1, 2)).mean().sqrt())
    numbers = {
        "noise": noise, "reach": reach(shape, table),
        "period": float(table.high[0] - table.low[0]) if closed else math.nan,
        "smoothing": smoothing.strength, "freedom": smoothing.freedom, "directions": classes.directions,
        "pooled": classes.pooled, "margin": margin,
        "slack": margin / speed + 1e-6 * float((table.high - table.low).max()),
    }  # fmt: skip
    error = classes.variance.sqrt() if classes.known else torch.full_like(classes.variance, math.nan)
    tensors = {
        "means": classes.means, "knots": fitted + shift, "coordinates": torch.from_numpy(places).to(shift),
        "spread": classes.spread, "standard_error": error, "centre": shift, "frame": frame,
        "covariance": within, "influence": influence, "hull": hull,
        **{k: v for k, v in vars(shape).items() if isinstance(v, Tensor)},
    }  # fmt: skip
    tensors = {name: tensor.to(points.dtype).contiguous() for name, tensor in tensors.items()}
    tensors["outliers"] = classes.outliers
    described = {
        "columns": shape.q, "closed": closed, "power": getattr(shape, "power", None),
        "closing": None if evidence is None else asdict(evidence), **numbers,
    }  # fmt: skip
    return described, tensors


def _on(value: Any, like: Tensor) -> Any:
    return value.to(like) if isinstance(value, Tensor) else value


def _check_labels(points: Tensor, labels: Tensor) -> int:
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.shape != points.shape[:1]:
        raise ManifoldError(
            f"PathCloud.fit: labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; give one "
            f"integer for each of the {len(points)} points"
        )
    if labels.device != points.device:
        raise ManifoldError(
            f"PathCloud.fit: points are on {points.device} and labels on {labels.device}; move one of them"
        )
    if int(labels.min()) < 0:
        raise ManifoldError(f"PathCloud.fit: a label is {int(labels.min())}; classes count from 0")
    found, count = labels.unique(), int(labels.max()) + 1
    if len(found) < count:
        empty = int((found != torch.arange(len(found), device=found.device)).nonzero()[0])
        raise ManifoldError(
            f"PathCloud.fit: class {empty} of {count} has no sample; number the classes 0 to c − 1 "
            "in the order of the path"
        )
    if count < 2:
        raise ManifoldError("PathCloud.fit: there is one class; a path needs at least 2, a loop 3")
    return count


def _check_coordinates(coordinates: Tensor | None, count: int) -> np.ndarray | None:
    if coordinates is None:
        return None
    given = coordinates.detach().cpu().double().numpy()
    given = given[:, None] if given.ndim == 1 else given
    if given.ndim != 2 or given.shape[0] != count or given.shape[1] < 1:
        raise ManifoldError(
            f"PathCloud.fit: coordinates have shape {tuple(coordinates.shape)}; give one row for each of the "
            f"{count} classes"
        )
    if not np.isfinite(given).all():
        raise ManifoldError("PathCloud.fit: the coordinates hold NaN or infinity; give every class a place")
    if given.shape[1] == 1 and not (np.diff(given[:, 0]) > 0).all():
        where = int(np.argmin(np.diff(given[:, 0]) > 0))
        raise ManifoldError(
            f"PathCloud.fit: the coordinates of a curve increase with the class, and those of classes "
            f"{where} and {where + 1} are {given[where, 0]:g} and {given[where + 1, 0]:g}; number the "
            "classes in order"
        )
    if len(np.unique(given, axis=0)) < count:
        raise ManifoldError("PathCloud.fit: two classes have the same coordinates; put them into one")
    return given


def summarise(points: Float[Tensor, "n D"], labels: Int[Tensor, "n"], count: int) -> Classes:
    """Means and noise of the classes, without far outliers."""
    away = points.new_empty(len(points))
    for index in range(count):
        own = (labels == index).nonzero()[:, 0]
        centre = points[own].median(0).values
        away[own] = frobenius_norm(points[own] - centre, 1)
    many = labels.bincount() >= 3
    usual = float(away[many[labels]].median()) if bool(many.any()) else 0.0
    limit = away.new_tensor([
        FAR * max(usual, float(away[labels == index].median())) for index in range(count)
    ])[labels]  # fmt: skip
    far = many[labels] & (away > limit) & (usual > 0)
    kept = (~far).nonzero()[:, 0]
    counts = labels[kept].bincount(minlength=count)
    sums = torch.zeros(count, points.shape[1], dtype=torch.float64, device=points.device)
    for rows in kept.split(ROWS):
        sums.index_add_(0, labels[rows], points[rows].double())
    means = sums / counts[:, None]
    squares = torch.zeros(count, dtype=torch.float64, device=points.device)
    for rows in kept.split(ROWS):
        squares.index_add_(0, labels[rows], (points[rows] - means[labels[rows]]).square().sum(-1))
    degrees = (counts - 1).double()
    known = bool((degrees > 0).any())
    spread = torch.where(degrees > 0, squares / degrees.clamp_min(1), math.nan).sqrt()
    pooled = float(squares.sum() / degrees.sum()) if known else 0.0
    variance = (PRIOR * pooled + squares) / (PRIOR + degrees) / counts
    directions = _directions(points, labels, means, kept) if pooled > 0 else 1.0
    return Classes(
        means, counts, spread, variance if known else torch.zeros_like(squares), known, directions,
        pooled,         far.nonzero()[:, 0], kept,
    )  # fmt: skip


def _directions(points: Tensor, labels: Tensor, means: Tensor, kept: Tensor) -> float:
    """(tr Σ)² / tr Σ² of the noise, from products of different samples, which have no bias."""
    picked = kept[:: max(1, len(kept) // PAIRED)]
    away = points[picked] - means[labels[picked]]
    gram = away @ away.mT
    apart = labels[picked][:, None] != labels[picked]
    squares = gram[apart].square()
    trace = float(gram.diagonal().mean())
    if not len(squares) or not float(squares.mean()) > 0:
        return 1.0
    return min(max(trace**2 / float(squares.mean()), 1.0), float(points.shape[1]))


def _steps(classes: Classes) -> np.ndarray:
    """The steps between neighbours, and the closing one last, without their noise.

    The square of a step holds the noise of both its ends, which is taken off. What is left is drawn to the
    mean of all, as far as its error is larger than the steps differ (James and Stein): where noise is all
    that makes them unequal, they come out equal.
    """
    after = classes.means.roll(-1, 0)
    square = (after - classes.means).square().sum(-1)
    scale = (classes.means - classes.means.mean(0)).square().sum(-1).mean()
    same = square[:-1] <= 1e-20 * scale
    if not float(scale) > 0 or bool(same.any()):
        where = int(same.nonzero()[0]) if bool(same.any()) else 0
        raise ManifoldError(
            f"PathCloud.fit: classes {where} and {where + 1} have the same mean; put them into one"
        )
    noise = classes.variance + classes.variance.roll(-1, 0)
    if not bool((noise > 0).any()):
        return square.sqrt().cpu().numpy()
    clean = square - noise
    error = (2 * noise**2 + 4 * clean.clamp_min(0) * noise) / classes.directions
    inner = clean[:-1]
    level = inner.mean().clamp_min(0.1 * square[:-1].mean())
    differ = (inner.var(correction=1 if len(inner) > 1 else 0) - error[:-1].mean()).clamp_min(0)
    share = differ / (differ + error).clamp_min(torch.finfo(error.dtype).tiny)
    drawn = torch.where(square < 4 * level, level + share * (clean - level), clean)
    return torch.maximum(drawn, 0.1 * torch.minimum(level, square)).sqrt().cpu().numpy()


def _check_closing_step(means: Tensor) -> None:
    """Refuses a loop whose last class is its first again: the way between them has no length."""
    square = (means.roll(-1, 0) - means).square().sum(-1)
    if not bool(square[-1] > SAME**2 * square.mean()):
        raise ManifoldError(
            "PathCloud.fit: the first and the last class have the same mean; put them into one, as a loop "
            "comes back to the first by itself, or give closed=False"
        )


def _breaks(given: np.ndarray | None, steps: np.ndarray, closed: bool) -> np.ndarray:
    """The coordinates of the classes on a curve, and where a closed one comes back to the first."""
    if given is None:
        breaks = np.concatenate([[0.0], np.cumsum(steps)])
        return breaks if closed else breaks[:-1]
    breaks = given[:, 0]
    if not closed:
        return breaks
    gaps = np.diff(breaks)
    even = np.ptp(gaps) < 1e-6 * gaps.mean()
    last = gaps.mean() if even else steps[-1] * (breaks[-1] - breaks[0]) / steps[:-1].sum()
    return np.concatenate([breaks, [breaks[-1] + last]])


def _span(fitted: Tensor, shift: Tensor) -> Tensor:
    """An orthonormal basis (D, r) of what the knots span."""
    _, values, rows = torch.linalg.svd(fitted, full_matrices=False)
    noise = torch.finfo(shift.dtype).eps * max(fitted.shape) * 10
    rank = max(1, int((values > noise * values[0]).sum()))
    return rows[:rank].mT.contiguous()


def _residuals(
    points: Tensor, labels: Tensor, classes: Classes, shape: Curve | Sheet, table: Table, shift: Tensor,
    frame: Tensor,
) -> tuple[Tensor, float, float]:  # fmt: skip
    """The covariance within classes in the span, the noise about the path, and twice the noise along it."""
    scatter = frame.new_zeros(frame.shape[1], frame.shape[1])
    along = squares = 0.0
    for rows in classes.kept.split(ROWS):
        samples = points[rows].double()
        inside = (samples - classes.means[labels[rows]]) @ frame
        scatter = scatter + inside.mT @ inside
        whole = samples - shift
        y = whole @ frame
        found = nearest(shape, table, y).coordinate
        value, first = shape.derivatives(found, 1)
        rest = (whole.square().sum(-1) - y.square().sum(-1)).clamp_min(0)
        squares += float(((y - value).square().sum(-1) + rest).sum())
        basis = torch.linalg.qr(first).Q
        along += float((basis.mT @ inside[..., None]).square().sum())
    degrees = max(1, int((classes.counts - 1).sum()))
    noise = (squares / len(classes.kept)) ** 0.5
    return scatter / degrees, noise, 2 * (along / shape.q / degrees) ** 0.5


def _hull(places: np.ndarray, shape: Curve | Sheet) -> Tensor:
    """The half-spaces of the hull of the coordinates: n·t + o ≤ 0 with n of length one (f, q + 1)."""
    if isinstance(shape, Curve):
        return torch.zeros(0, 2)
    try:
        return torch.from_numpy(np.unique(ConvexHull(places).equations.round(12), axis=0))
    except QhullError as flat:
        raise ManifoldError(
            f"PathCloud.fit: the coordinates of {len(places)} classes have no hull in {shape.q} dimensions; "
            "give fewer columns"
        ) from flat


def reach(shape: Curve | Sheet, table: Table) -> float:
    """The reach of a curve or sheet: the smallest radius of curvature, or half the narrowest gap.

    Federer's formula, inf ‖q − p‖² / (2 · distance of q − p from the tangent space at p), over pairs of
    places of the table that are not next to each other; for those that are, 1 / ‖II(v, v)‖ of unit v.

    Source: Federer, "Curvature measures" (1959), theorem 4.18.
    """
    picked = (
        slice(None) if isinstance(shape, Curve) else slice(None, None, max(1, len(table.places) // PLACES))
    )
    places = table.places[picked]
    value, first, second = shape.derivatives(places, 2)
    basis = torch.linalg.qr(first).Q
    worst = float(_bends(first, second, basis).max())
    spacing = float((value[1:] - value[:-1]).square().sum(-1).amax().sqrt())
    for start in range(0, len(value), 256):
        own = slice(start, start + 256)
        apart = value[None] - value[own, None]
        square = apart.square().sum(-1)
        tangent = torch.einsum("bgr,brq->bgq", apart, basis[own]).square().sum(-1)
        normal = (square - tangent).clamp_min(0).sqrt()
        far = square > 4 * spacing**2 if isinstance(shape, Curve) else square > 1e-3 * square.max()
        worst = max(worst, float(torch.where(far, 2 * normal / torch.where(far, square, 1.0), 0.0).max()))
    size = float((value - value.mean(0)).square().sum(-1).mean().sqrt())
    return 1 / worst if worst * size > 1e-6 else math.inf


def _bends(first: Tensor, second: Tensor, basis: Tensor) -> Tensor:
    """‖II(v, v)‖ over unit tangent vectors of several directions (b, directions)."""
    q = first.shape[-1]
    generator = torch.Generator().manual_seed(0)
    directions = torch.cat([torch.eye(q), torch.randn(16 * (q > 1), q, generator=generator)]).to(first)
    pushed = first @ directions.mT
    bend = torch.einsum("brij,ki,kj->brk", second, directions, directions)
    bend = bend - basis @ (basis.mT @ bend)
    speed = pushed.square().sum(1)
    return bend.square().sum(1).sqrt() / torch.where(speed > 0, speed, math.inf)
