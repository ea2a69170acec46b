"""The result of a diagnosis: tables, what a pair of values may expect, and safe files."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from geoedit.diagnosis.plan import MEAN_DIFFERENCE
from geoedit.diagnosis.scores import Calibration, bootstrap_auroc, calibration
from geoedit.errors import EditError

FORMAT = "geoedit.diagnosis"
VERSION = 2
READS = (1, 2)
GEOMETRY = ("off_manifold", "off_distance", "off_relative", "off_visible", "safe_low", "safe_scale")
"""Columns of the table that version 1 did not have; NaN where a number is not known."""
ALL_SITES = "all sites"
FEATURE = "feature_"
"""Begins the names of the columns that the probability is made of."""


@dataclass(frozen=True)
class Predictor:
    """One number that is to foretell success: its column in the table, its name for people, what it is."""

    column: str
    label: str
    description: str


@dataclass(frozen=True)
class SiteSummary:
    """What was seen of the concept at one site.

    Attributes:
        label: the site in words, the key that the tables use.
        site: its fields, as `Site.to_dict` gives them.
        place: the site without its token; `token`: its token; `depth`: its order through the network.
        coordinates: class means on their first three principal axes, one row a value (values x 3).
        explained: share of the class means' variance on each of those axes.
        between: mean square distance of the class means from their centre; `within`: mean square distance of
            states from their class mean (squared units of the state).
        separation: share of the variance that lies between classes once each sentence's own mean is taken
            out.
        geometry: the shape of the concept here, as `geoedit.diagnosis.geometry.site_geometry` and
            `geoedit.diagnosis.advice.site_advice` give it: plain JSON values; empty in files of version 1.
    """

    label: str
    site: dict[str, Any]
    place: str
    token: str
    depth: int
    coordinates: list[list[float]]
    explained: list[float]
    between: float
    within: float
    separation: float
    geometry: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expectation:
    """What an edit from one value to another may expect at one site.

    `probability` is the mean over sentences; `margin` the mean margin of the default predictor (its units);
    `sentences` how many sentences were judged; `nearest` the rival that comes closest most often; `reason`
    says it in words; `observed` the share that succeeded, None unless the edits were run. `safe_low` and
    `safe_scale` are the scales along the same vector between which it is expected to succeed (None and 0
    where at none, None and None where it was not looked at); `advice` says which edit to make ("linear",
    "tangent", "geodesic", "another site: …") and `advice_reason` why.
    """

    site: str
    edit: str
    scale: float
    source: str
    target: str
    probability: float
    margin: float
    sentences: int
    nearest: str
    reason: str
    observed: float | None
    safe_low: float | None = None
    safe_scale: float | None = None
    advice: str = ""
    advice_reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Whether straight edits move a concept in a model: predicted, and observed where the edits were run.

    Attributes:
        model: name of the model. concept: name, kind, values, templates.
        sites: what was seen at each site, in the order of the network.
        table: one row for each edit at each site. Columns: site, edit, template, source, target, from_value,
            to_value, scale, one for each predictor, probability, nearest; off_manifold and off_distance (how
            far off the concept's manifold the edit ends, by its second fundamental form and by projection, in
            units of the state), off_relative (the latter over the manifold's noise), off_visible (what the
            rest of the network sees of it); safe_low and safe_scale (the scales between which the edit is
            expected to succeed, counted along its own direction where its scale is negative); and when the
            edits were run: success, answer, log_odds_change (nats), else missing.
        predictors: what the predictor columns hold; the first is the default.
        settings: what was asked and how it was run. versions: of the libraries. notes: what a reader must
            know.
        sweeps: a few edits followed over many scales, as `geoedit.diagnosis.sweeps.sweep_results` gives them.
        features: what the probabilities were made of (columns feature_…, see `geoedit.diagnosis.features`),
            in the rows of `table`. They are many and go into no file: None in what was read from one.
    """

    model: str
    concept: dict[str, Any]
    sites: tuple[SiteSummary, ...]
    table: pd.DataFrame
    predictors: tuple[Predictor, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sweeps: tuple[dict[str, Any], ...] = ()
    features: pd.DataFrame | None = None

    @property
    def applied(self) -> bool:
        """Whether the edits were run."""
        return bool(self.table["success"].notna().any())

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Per site: how many edits succeed, predicted and observed, and each predictor's AUROC.

        Rows: each site, and all sites together. Columns: site, edits, predicted (mean probability), observed
        (share that succeeded), predictor, auroc, low, high (95 % bootstrap over pairs of values). AUROC is
        NaN where the edits were not run or all ended alike.
        """
        return pd.DataFrame(self._summary_rows())

    @cached_property
    def geometry(self) -> pd.DataFrame:
        """The concept's shape, one row a site; NaN and None where it is not known.

        Columns: site, kind (of manifold), dimension, dimension_low, dimension_high, closed, curvature
        (1/length), radius, snr, reliable, reach, noise, functional_ratio, functional_radius, one safe_scale
        for each kind of edit, advice, reason (why curvature is not known).
        """
        return pd.DataFrame([_geometry_row(site) for site in self.sites])

    def _summary_rows(self) -> list[dict[str, Any]]:
        rows = []
        parts = [(site.label, self.table[self.table["site"] == site.label]) for site in self.sites]
        if len(parts) > 1:
            parts.append((ALL_SITES, self.table))
        for label, part in parts:
            run = part[part["success"].notna()]
            success = run["success"].to_numpy(dtype=bool)
            pairs = list(zip(run["source"], run["target"], strict=True))
            for predictor in self.predictors:
                scores = run[predictor.column].to_numpy(dtype=float)
                seen = ~np.isnan(scores)
                clusters = [pair for pair, keep in zip(pairs, seen, strict=True) if keep]
                ranking = bootstrap_auroc(scores[seen], success[seen], clusters)
                rows.append(
                    {
                        "site": label,
                        "edits": len(part),
                        "predicted": float(part["probability"].mean()),
                        "observed": float(success.mean()) if len(run) else float("nan"),
                        "predictor": predictor.column,
                        "auroc": ranking.auroc,
                        "low": ranking.low,
                        "high": ranking.high,
                    }
                )
        return rows

    def calibration(self, site: str | None = None) -> Calibration:
        """Compare predicted probabilities with the share of edits that succeeded, at one site or over all.

        Raises:
            EditError: the edits were not run, or there is no such site.
        """
        part = self.table if site is None else self._at(site)
        run = part[part["success"].notna()]
        return calibration(run["probability"].to_numpy(dtype=float), run["success"].to_numpy(dtype=bool))

    def predict(self, source: str, target: str) -> list[Expectation]:
        """Say for every site and kind of edit what moving `source` to `target` may expect.

        A pair that the seeded draw left out at this `max_edits` is an error, not a guess.

        Raises:
            EditError: a value that the concept does not have, the two are one, or the pair was not judged.
        """
        values = self.concept["values"]
        for name, value in (("source", source), ("target", target)):
            if value not in values:
                raise EditError(
                    f"concept {self.concept['name']!r} has no value {value!r} ({name}); it has: "
                    f"{_listed(values)}."
                )
        if source == target:
            raise EditError(f"source and target are both {source!r}: nothing would have to change.")
        part = self.table[(self.table["source"] == source) & (self.table["target"] == target)]
        if part.empty:
            raise EditError(
                f"the edit from {source!r} to {target!r} was not judged: either both have the same answer "
                f"in every template, or the draw of {self.settings.get('max_edits')} edits left it out; "
                "raise max_edits."
            )
        return [
            self._expectation(str(site), str(edit), float(scale), rows, part)
            for (site, edit, scale), rows in part.groupby(["site", "edit", "scale"], sort=False)
        ]

    def _expectation(
        self, site: str, edit: str, scale: float, rows: pd.DataFrame, pair: pd.DataFrame
    ) -> Expectation:
        from geoedit.diagnosis.advice import advise, known_facts  # it stands on this module

        default = self.predictors[0]
        probability, margin = float(rows["probability"].mean()), float(rows[default.column].mean())
        nearest = str(rows["nearest"].mode().iloc[0])
        target = str(rows["target"].iloc[0])
        verdict = f"lands on {target!r}" if margin > 0 else f"stays nearer to {nearest!r} than to {target!r}"
        run = rows["success"].dropna()
        own = pair[pair["edit"] == MEAN_DIFFERENCE]
        there = own["site"] == site
        geometry = next(entry.geometry for entry in self.sites if entry.label == site)
        facts = known_facts(rows, own[there], own[~there], geometry)
        advice, advice_reason = advise(facts)
        return Expectation(
            site=site,
            edit=edit,
            scale=scale,
            source=str(rows["source"].iloc[0]),
            target=target,
            probability=probability,
            margin=margin,
            sentences=len(rows),
            nearest=nearest,
            reason=f"on average the edited state {verdict} ({default.label} margin {margin:+.2f})",
            observed=float(run.astype(bool).mean()) if len(run) else None,
            safe_low=_plain(facts.safe_low),
            safe_scale=_plain(facts.safe_high),
            advice=advice,
            advice_reason=advice_reason,
        )

    def _at(self, site: str) -> pd.DataFrame:
        labels = [entry.label for entry in self.sites]
        if site not in labels:
            raise EditError(f"this diagnosis has no site {site!r}; it has: {_listed(labels)}.")
        return self.table[self.table["site"] == site]

    def to_dict(self) -> dict[str, Any]:
        """Give everything but `features` as plain JSON values; missing numbers are None."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "concept": self.concept,
            "sites": [asdict(site) for site in self.sites],
            "predictors": [asdict(predictor) for predictor in self.predictors],
            "summary": _columns(self.summary),
            "table": _columns(self.table),
            "settings": self.settings,
            "versions": self.versions,
            "notes": list(self.notes),
            "sweeps": list(self.sweeps),
        }

    def to_json(self, path: str | Path) -> Path:
        """Write the whole result as JSON, at once or not at all, and return the path."""
        return write_text(Path(path), json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False))

    @classmethod
    def from_json(cls, path: str | Path) -> Diagnosis:
        """Read what `to_json` wrote.

        Raises:
            EditError: no such file, or not a diagnosis that this version reads.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise EditError(f"there is no file {path}; write one with diagnosis.to_json(path).") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EditError(f"{path} is not JSON: {error}.") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise EditError(f"{path} is JSON but no diagnosis (its format should be {FORMAT!r}).")
        if data.get("version") not in READS:
            raise EditError(
                f"{path} has version {data.get('version')}; this geoedit reads versions "
                f"{' and '.join(map(str, READS))}."
            )
        predictors = tuple(Predictor(**entry) for entry in data["predictors"])
        table = {name: column for name, column in data["table"].items() if not name.startswith(FEATURE)}
        return cls(
            model=data["model"],
            concept=data["concept"],
            sites=tuple(SiteSummary(**entry) for entry in data["sites"]),
            table=_typed(pd.DataFrame(table), predictors),
            predictors=predictors,
            settings=data["settings"],
            versions=data["versions"],
            notes=tuple(data["notes"]),
            sweeps=tuple(data.get("sweeps", ())),
        )

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page that works offline, at once or not at all, and return the path."""
        from geoedit.report.page import page

        return write_text(Path(path), page(self))


def write_text(path: Path, text: str) -> Path:
    """Write a text file through a temporary one beside it, so that no half-written file is ever seen.

    Raises:
        EditError: the folder can't be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EditError(
            f"can't write {path}: {error.strerror or error}; give a folder that can be written to."
        ) from error
    return path


def _typed(table: pd.DataFrame, predictors: tuple[Predictor, ...]) -> pd.DataFrame:
    for column in (
        *(predictor.column for predictor in predictors),
        "probability",
        "scale",
        "log_odds_change",
        *GEOMETRY,
    ):
        table[column] = table[column].astype("float64") if column in table else np.nan
    table["success"] = table["success"].astype("boolean")
    return table


def _geometry_row(site: SiteSummary) -> dict[str, Any]:
    found = site.geometry
    dimension, functional = found.get("dimension") or {}, found.get("functional") or {}
    row = {
        "site": site.label,
        "kind": found.get("kind"),
        "dimension": dimension.get("value"),
        "dimension_low": dimension.get("low"),
        "dimension_high": dimension.get("high"),
        "closed": found.get("closed"),
        **{name: found.get(name) for name in ("curvature", "radius", "snr", "reliable", "reach", "noise")},
        "functional_ratio": functional.get("ratio"),
        "functional_radius": functional.get("radius"),
        **{f"safe_scale, {kind}": scale for kind, scale in (found.get("safe_scale") or {}).items()},
        "advice": found.get("advice"),
        "reason": found.get("reason"),
    }
    words = ("site", "kind", "closed", "reliable", "advice", "reason")
    return {
        name: float("nan") if value is None and name not in words else value for name, value in row.items()
    }


def _columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    """The columns of a table as plain JSON values."""
    return {str(name): _plain_column(table[name]) for name in table}


def _plain_column(column: pd.Series) -> list[Any]:
    if column.dtype != np.float64:
        return [_plain(entry) for entry in column.astype(object)]
    numbers = column.to_numpy()
    pairs = zip(numbers.tolist(), np.isfinite(numbers).tolist(), strict=True)
    return [number if finite else None for number, finite in pairs]


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "")
