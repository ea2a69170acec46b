"""The result of an evaluation: curves of every image; the tables, page and files that follow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoedit.edits.io import write_whole
from geoedit.errors import EditError
from geoedit.sliders.evaluation.claims import Claim
from geoedit.sliders.evaluation.table import (
    COLUMNS,
    Block,
    blocks,
    interference,
    largest_effect,
    rows_of,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FORMAT = "geoedit.slider_evaluation"
VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """What sliders did to images.

    Attributes:
        records: one for each image: slider, method, seed, prompt, scale, every attribute in its own unit
            (angles followed along the scales), and residual, kind and distance where they are known.
        natural_sd: one natural standard deviation of each attribute, in its own unit.
        claims: for each slider's label what it is judged by.
        within: the scales that the table looks at.
        ranges: for each label the safe ranges, "predicted" and "observed", as far as they were asked for.
        compositions: for each composition what its members do together and apart.
        pictures: for each label and method some rows of images, as PNG in base64, in the order of the scales.
        notes: what a reader must know besides.
        settings: how the images were drawn.
    """

    records: tuple[Mapping[str, Any], ...]
    natural_sd: Mapping[str, float]
    claims: Mapping[str, Claim]
    within: tuple[float, float]
    ranges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    compositions: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def curves(self) -> pd.DataFrame:
        """A row for each image; see `records`."""
        import pandas as pd

        return pd.DataFrame.from_records(list(self.records))

    @property
    def table(self) -> pd.DataFrame:
        """A row for each slider and seed, and one over all seeds; prompting beside it. See `COLUMNS`."""
        import pandas as pd

        rows = []
        for label, method, block, own in self._blocks():
            found = rows_of(label, method, block, own, self.within)
            if method == "slider":
                found[-1] |= self._ranges(label, block, own)
            rows += found
        frame = pd.DataFrame.from_records(rows)
        return frame.reindex(columns=[name for name in COLUMNS if name in frame])

    @property
    def interference(self) -> pd.DataFrame:
        """Mean |change| over the slider's range: a row a slider and its prompting, a column an attribute."""
        return self._interference(1)

    @property
    def interference_signed(self) -> pd.DataFrame:
        """The same with the sign kept: the mean change over the range; a slider's own attribute is ±1."""
        return self._interference(0)

    @property
    def additivity(self) -> pd.DataFrame:
        """A row for each composition and member: its attribute's change together, and the sum apart."""
        import pandas as pd

        return pd.DataFrame.from_records(list(self.compositions))

    def block(self, label: str, method: str = "slider") -> Block:
        """The curves of one slider as arrays, attributes in natural standard deviations.

        Raises:
            EditError: nothing has that label and method.
        """
        known = []
        for its_label, its_method, block, _ in self._blocks():
            if (its_label, its_method) == (label, method):
                return block
            known.append(f"{its_label} ({its_method})")
        raise EditError(f"there is nothing for {label!r} ({method}); there are {', '.join(known)}")

    def figure(self, name: str) -> Figure:
        """A figure for a paper or a notebook: "curves", "interference" or "ranges".

        Raises:
            EditError: no such figure, or nothing was measured that it could show.
        """
        from geoedit.sliders.evaluation.figures import draw

        return draw(self, name)

    def to_html(self, path: str | Path) -> Path:
        """Write a page with strips, curves and matrix that loads nothing from anywhere.

        Raises:
            EditError: the folder is not there.
        """
        from geoedit.sliders.evaluation.page import page

        return _write(path, page(self))

    def to_json(self, path: str | Path) -> Path:
        """Write everything as JSON, whole or not at all; `Evaluation.load` reads it again.

        Raises:
            EditError: the folder is not there.
        """
        return _write(path, json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; a number that is not known is None."""
        found = plain(
            {
                "format": FORMAT,
                "version": VERSION,
                "records": self.records,
                "natural_sd": self.natural_sd,
                "claims": {label: vars(own) for label, own in self.claims.items()},
                "within": self.within,
                "ranges": self.ranges,
                "compositions": self.compositions,
                "pictures": self.pictures,
                "notes": self.notes,
                "settings": self.settings,
            }
        )
        assert isinstance(found, dict)
        return found

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation that `to_json` wrote.

        Raises:
            EditError: no such file, or it is no evaluation of this version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise EditError(f"can't read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise EditError(f"{path} is not JSON ({error}); give a file that to_json wrote") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise EditError(f"{path} is no evaluation of sliders; give a file that Evaluation.to_json wrote")
        if data.get("version") != VERSION:
            raise EditError(
                f"{path} is an evaluation of version {data.get('version')}, and this code reads {VERSION}"
            )
        try:
            return cls(
                records=tuple(_unknown_to_nan(row) for row in data["records"]),
                natural_sd=data["natural_sd"],
                claims={label: Claim(**own) for label, own in data["claims"].items()},
                within=(data["within"][0], data["within"][1]),
                ranges={label: dict(found) for label, found in data["ranges"].items()},
                compositions=tuple(_unknown_to_nan(row) for row in data["compositions"]),
                pictures=tuple(data["pictures"]),
                notes=tuple(data["notes"]),
                settings=data["settings"],
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise EditError(f"{path} is damaged: {error!r} is missing or not what it should be") from error

    def _blocks(self) -> list[tuple[str, str, Block, Claim]]:
        return [
            (label, method, block, self.claims.get(label) or largest_effect(block.within(*self.within)))
            for label, method, block in blocks(self.curves, self.natural_sd)
        ]

    def _ranges(self, label: str, block: Block, own: Claim) -> dict[str, float]:
        from geoedit.sliders.evaluation.curves import spearman

        found: dict[str, float] = {}
        for kind, name in (("predicted", "safe"), ("observed", "observed")):
            if kind in self.ranges.get(label, {}):
                known = self.ranges[label][kind]
                found |= {f"{name}_{end}": _number(known[end]) for end in ("low", "high")}
        if math.isfinite(found.get("safe_low", math.nan) + found.get("safe_high", math.nan)):
            part = block.within(found["safe_low"], found["safe_high"])
            if part is not block or len(block.scales) < 3:
                rho = spearman(part.scales, own.sign * part.values[own.attribute])
                found["spearman_safe"] = float(rho[rho == rho].mean()) if (rho == rho).any() else math.nan
        return found

    def _interference(self, which: int) -> pd.DataFrame:
        import pandas as pd

        rows = {}
        for label, method, block, own in self._blocks():
            name = label if method == "slider" else f"{label} ({method})"
            rows[name] = interference(block.within(*self.within), own)[which]
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(self.natural_sd))


def plain(value: Any) -> Any:
    """Plain JSON of mappings, sequences and numbers; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _unknown_to_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _write(path: str | Path, text: str) -> Path:
    target = Path(path)
    if not target.parent.is_dir():
        raise EditError(
            f"the folder {target.parent} does not exist, so {target.name} cannot be written there"
        )
    write_whole(target, text.encode())
    return target
