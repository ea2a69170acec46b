"""The result of an analysis: a table, figures, a page, a file."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_analysis.errors import UpdateError
from peft_analysis.report.columns import COLUMNS
from peft_analysis.report.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FORMAT = "peft_analysis.report"
VERSION = 1


@dataclass(frozen=True)
class Report:
    """What an update changed, matrix by matrix.

    Every value is plain JSON; a number that is not known is None there and NaN (or <NA>) in the table.

    Attributes:
        name: what the page calls the update.
        source: where the update comes from, in words.
        base: where the base's weights come from, or None.
        rows: one record a matrix, in the order of the update: the columns of the table, and under "curves"
            what the figures draw (singular values, angles, intruders, …).
        vectors: one record for each changed parameter that is no matrix: parameter, norm, relative_norm.
        verdict: what the update is as a whole (see `peft_analysis.verdict`), or None.
        left_out: what was not computed: {"what": …, "why": …, "matrices": how many}.
        notes: what a reader must know besides.
        settings: the arguments of the call.
        versions: of the packages that computed.
    """

    name: str
    source: str
    base: str | None
    rows: tuple[dict[str, Any], ...]
    vectors: tuple[dict[str, Any], ...] = ()
    verdict: Mapping[str, Any] | None = None
    left_out: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def table(self) -> "pd.DataFrame":
        """A tidy table with a row a matrix; `peft_analysis.report.COLUMNS` says what each column means."""
        import pandas as pd

        columns = {}
        for column in COLUMNS:
            values = [row.get(column.name) for row in self.rows]
            if column.form == "text":
                columns[column.name] = pd.Series(values, dtype="object")
            elif column.form == "count":
                columns[column.name] = pd.array(values, dtype="Int64")
            else:
                numbers = [math.nan if value is None else float(value) for value in values]
                columns[column.name] = pd.Series(numbers, dtype="float64")
        return pd.DataFrame(columns)

    def figure(self, name: str) -> "Figure":
        """A figure for a paper or a notebook: "change", "ranks", "intruders", "spectra" or "angles".

        Raises:
            UpdateError: no such figure, or nothing was measured that it could show.
        """
        from peft_analysis.report.figures import draw

        return draw(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "source": self.source,
            "base": self.base,
            "verdict": self.verdict,
            "rows": list(self.rows),
            "vectors": list(self.vectors),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    def to_json(self, path: str | Path) -> Path:
        """Write everything as JSON, whole or not at all; `Report.load` reads it again.

        Raises:
            UpdateError: the file cannot be written.
        """
        return write_text(path, json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read a report that `to_json` wrote.

        Raises:
            UpdateError: no such file, or it is no report of this version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UpdateError(f"can't read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise UpdateError(
                f"{path} is not JSON ({error}); give a file that Report.to_json wrote"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UpdateError(f"{path} is no report of peft_analysis; give a file that Report.to_json wrote")
        if data.get("version") != VERSION:
            raise UpdateError(
                f"{path} is a report of version {data.get('version')}, and this code reads {VERSION}; "
                "run the analysis again"
            )
        known: dict[str, Any] = {name: data[name] for name in ("name", "source", "base", "verdict")}
        known |= {name: dict(data[name]) for name in ("settings", "versions")}
        known |= {name: tuple(data[name]) for name in ("rows", "vectors", "left_out", "notes")}
        return cls(**known)

    def to_html(self, path: str | Path) -> Path:
        """Write a page that holds everything and loads nothing: figures, table, export.

        Raises:
            UpdateError: the file cannot be written.
        """
        from peft_analysis.report.page import page

        return write_text(path, page(self))

    def __repr__(self) -> str:
        return f"Report({len(self.rows)} matrices, source={self.source!r}, base={self.base!r})"
