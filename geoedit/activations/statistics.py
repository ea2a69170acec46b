"""Means and covariances of states, for all sites in one pass, without keeping the states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoedit.activations.collect import Prompts, batch_size_for
from geoedit.activations.inputs import read_inputs
from geoedit.activations.processes import Processes
from geoedit.activations.reading import locate_all, plan, read_states
from geoedit.activations.store import MissingSiteError
from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint, fingerprint
from geoedit.site import Site


@dataclass(frozen=True)
class Moments:
    r"""Count, mean and scatter of rows, in float64; two of them merge into those of all rows together.

    `scatter` is \(M = \sum_i (x_i - \bar x)(x_i - \bar x)^\top\), or its diagonal alone. With \(\delta\) the
    difference of two means, \(M_{ab} = M_a + M_b + \delta\delta^\top\, n_a n_b / (n_a + n_b)\): no large sums
    are subtracted, so figures far from zero keep their digits (Chan, Golub & LeVeque 1983).
    """

    count: int
    mean: Float[Tensor, " width"]
    scatter: Float[Tensor, "width *again"]

    @classmethod
    def of(cls, states: Float[Tensor, "rows width"], *, full: bool) -> Moments:
        """Moments of rows; with `full` the whole scatter matrix, else its diagonal."""
        rows = states.to(torch.float64)
        mean = rows.mean(0)
        centred = rows - mean
        return cls(rows.shape[0], mean, centred.T @ centred if full else centred.square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape or self.scatter.shape != other.scatter.shape:
            raise EditError(
                f"moments of width {self.mean.shape[0]} and {other.mean.shape[0]} (scatter "
                f"{tuple(self.scatter.shape)} and {tuple(other.scatter.shape)}) do not merge."
            )
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        spread = _square(delta, self.scatter) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + spread)


def _square(delta: Float[Tensor, " width"], like: Tensor) -> Tensor:
    """The outer product of a difference with itself, or its diagonal: whichever `like` is."""
    if like.dim() == 1:
        return delta.square()
    return rearrange(delta, "i -> i 1") * rearrange(delta, "j -> 1 j")


@dataclass(frozen=True)
class Statistics:
    """Counts, means and covariances by site and label, in float64.

    Without a label, all rows together. Two statistics of the same sites add up (`+`) to those of all rows.

    Attributes:
        moments: for each site, the moments of each label.
        fingerprint: of the model that the states come from.
    """

    moments: Mapping[Site, Mapping[str, Moments]] = field(repr=False)
    fingerprint: Fingerprint

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that were read."""
        return tuple(self.moments)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of their first prompt."""
        return tuple(dict.fromkeys(label for by_label in self.moments.values() for label in by_label))

    def count(self, site: Site, label: str | None = None) -> int:
        """How many rows there are."""
        return self._of(site, label).count

    def mean(self, site: Site, label: str | None = None) -> Float[Tensor, " width"]:
        """The mean of the rows."""
        return self._of(site, label).mean

    def means(self, site: Site) -> Float[Tensor, "labels width"]:
        """The mean of every label's rows, in the order of `labels`."""
        return torch.stack([self.mean(site, label) for label in self.labels])

    def variance(self, site: Site, label: str | None = None) -> Float[Tensor, " width"]:
        """The variance of each feature, over n - 1.

        Raises:
            EditError: fewer than two rows.
        """
        found = self._of(site, label)
        scatter = found.scatter if found.scatter.dim() == 1 else found.scatter.diagonal()
        return scatter / self._free(found, site, label)

    def covariance(self, site: Site, label: str | None = None) -> Float[Tensor, "width width"]:
        """The covariance of the features, over n - 1.

        Raises:
            EditError: fewer than two rows, or covariances were not asked for.
        """
        found = self._of(site, label)
        self._need_full(found)
        return found.scatter / self._free(found, site, label)

    def within(self, site: Site) -> Float[Tensor, "width width"]:
        """The covariance of rows around the mean of their own label, over n - (number of labels).

        Raises:
            EditError: no label has two rows, or covariances were not asked for.
        """
        parts = list(self._by_label(site).values())
        self._need_full(parts[0])
        free = sum(part.count for part in parts) - len(parts)
        if free < 1:
            raise EditError(f"every label has one row at the site {site}; give more prompts a label.")
        return torch.stack([part.scatter for part in parts]).sum(0) / free

    def __add__(self, other: Statistics) -> Statistics:
        if set(self.moments) != set(other.moments):
            raise EditError("statistics of different sites do not add up; collect both at the same sites.")
        difference = self.fingerprint.difference(other.fingerprint)
        if difference is not None:
            raise EditError(
                f"statistics of two models do not add up ({difference}); read both from one model."
            )
        return Statistics(
            {site: _merge(by_label, other.moments[site]) for site, by_label in self.moments.items()},
            self.fingerprint,
        )

    def _by_label(self, site: Site) -> Mapping[str, Moments]:
        if site not in self.moments:
            raise MissingSiteError(
                f"the site {site} was not read; there are: {', '.join(map(str, self.moments))}."
            )
        return self.moments[site]

    def _of(self, site: Site, label: str | None) -> Moments:
        by_label = self._by_label(site)
        if label is None:
            return reduce(Moments.__add__, by_label.values())
        if label not in by_label:
            raise EditError(f"no rows at {site} have the label {label!r}; there are: {', '.join(by_label)}.")
        return by_label[label]

    @staticmethod
    def _free(found: Moments, site: Site, label: str | None) -> int:
        if found.count < 2:
            whose = "" if label is None else f" with the label {label!r}"
            raise EditError(
                f"there is one row at {site}{whose}, which has no spread; give at least two prompts."
            )
        return found.count - 1

    @staticmethod
    def _need_full(found: Moments) -> None:
        if found.scatter.dim() == 1:
            raise EditError("only variances were kept; ask statistics(…, covariance=True).")


def _merge(one: Mapping[str, Moments], other: Mapping[str, Moments]) -> dict[str, Moments]:
    merged = dict(one)
    for label, moments in other.items():
        merged[label] = merged[label] + moments if label in merged else moments
    return merged


def statistics(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    sites: Iterable[Site],
    labels: Sequence[str] | None = None,
    covariance: bool = False,
    *,
    values: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Statistics:
    """Means, variances and, when asked, covariances at every site, by label, in one pass over the prompts.

    Memory: one batch, and for each site and label `width` numbers, or `width` squared ones with `covariance`.
    Under `accelerate launch` every process calls this with the same arguments, reads its share, and gets the
    figures of all.

    Args:
        model: as for `collect`, like tokenizer, prompts, sites, values, batch_size and progress.
        tokenizer: see `collect`.
        prompts: see `collect`.
        sites: see `collect`.
        labels: one for each prompt; None: the values that the prompts name, else one label for all.
        covariance: keep whole covariance matrices, not only variances.
        values: see `collect`.
        batch_size: see `collect`.
        progress: see `collect`.

    Raises:
        EditError: as `collect`; and for labels of another number than the prompts.
    """
    places = locate_all(model, sites)
    source = read_inputs(model, tokenizer, prompts, values)
    source.check(model, tuple(places))
    if labels is not None and len(labels) != len(source):
        raise EditError(f"there are {len(labels)} labels for {len(source)} prompts; give one for each.")
    named = labels if labels is not None else ["all" if value is None else value for value in source.values]
    processes = Processes.current()
    sink = _Accumulators(list(places), named, full=covariance)

    def work() -> None:
        fitted, batches = plan(model, source, batch_size_for(source, batch_size, processes))
        read_states(model, fitted, places, processes.share(batches), sink, progress=progress)

    processes.together(work)
    return Statistics(sink.result(processes), fingerprint(model))


class _Accumulators:
    """A sink that keeps the moments of each label, on the device that the states are on."""

    def __init__(self, sites: Sequence[Site], labels: Sequence[str], *, full: bool) -> None:
        self.sites, self.full = sites, full
        self.names = list(dict.fromkeys(labels))
        codes = {name: code for code, name in enumerate(self.names)}
        self.codes = torch.tensor([codes[label] for label in labels])
        self.moments: list[dict[str, Moments]] = [{} for _ in sites]

    def add(self, place: int, owners: Int[Tensor, " rows"], states: Float[Tensor, "rows width"]) -> None:
        """Merge the rows of each label into what is there."""
        rows = states.detach()
        if rows.device.type == "mps":  # it has no float64
            rows = rows.cpu()
        codes = self.codes[owners]
        for code in codes.unique().tolist():
            chosen = rows[(codes == code).to(rows.device)]
            update = {self.names[code]: Moments.of(chosen, full=self.full)}
            self.moments[place] = _merge(self.moments[place], update)

    def batch_done(self, indices: Sequence[int]) -> None:
        """Nothing to do."""

    def result(self, processes: Processes) -> dict[Site, dict[str, Moments]]:
        """The moments of all processes together, on the CPU; labels in their order."""
        found = {}
        for site, by_label in zip(self.sites, self.moments, strict=True):
            known = {
                name: Moments(part.count, part.mean.cpu(), part.scatter.cpu())
                for name, part in by_label.items()
            }
            found[site] = _reduced(known, self.names, processes, full=self.full)
        return found


def _reduced(
    mine: Mapping[str, Moments], names: Sequence[str], processes: Processes, *, full: bool
) -> dict[str, Moments]:
    r"""Moments of all processes together.

    \(n = \sum n_r\), \(\bar x = \sum n_r \bar x_r / n\), then \(M = \sum (M_r + n_r (\bar x_r - \bar x)(\bar
    x_r - \bar x)^\top)\).
    """
    if processes.world == 1:
        return {name: mine[name] for name in names if name in mine}
    widths = processes.objects({part.mean.shape[0] for part in mine.values()})
    width = next(iter(set().union(*widths)), 0)
    empty = Moments(0, torch.zeros(width).double(), torch.zeros(width, *([width] if full else [])).double())
    merged = {}
    for name in names:
        part = mine.get(name, empty)
        count = int(processes.total(torch.tensor(part.count)))
        if count == 0:
            continue
        mean = processes.total(part.mean * (part.count / count))
        scatter = processes.total(part.scatter + _square(part.mean - mean, part.scatter) * part.count)
        merged[name] = Moments(count, mean, scatter)
    return merged
