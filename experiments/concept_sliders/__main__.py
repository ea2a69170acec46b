"""The study's command: `python -m experiments.concept_sliders [--small] [FOLDER]`."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from experiments.concept_sliders.page import write
from experiments.concept_sliders.study import SMALL, Settings, run
from geoedit.edits.io import write_whole

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NAME = "concept_sliders"


def main(arguments: list[str] | None = None) -> Path:
    """Run the study and write its rows and its page; returns the page's path."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{NAME}", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("demo-out") / NAME, help="of what is kept"
    )
    parser.add_argument("--small", action="store_true", help="a slice that takes a minute")
    parser.add_argument("--family", choices=("unet", "flow"), help="one family only, to share the work")
    parser.add_argument("--seeds", type=int, help="of training, instead of 5")
    parser.add_argument("--flow-seeds", type=int, help="the same for shapes-flow, instead of 2")
    parser.add_argument("--results", type=Path, help="where the page goes; docs/results for a whole run")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", message=".*scale.*safe range.*")
    settings = SMALL if given.small else Settings()
    if given.family:
        settings = replace(settings, families=(given.family,))
    if given.seeds:
        settings = replace(settings, seeds=given.seeds)
    if given.flow_seeds:
        settings = replace(settings, flow_seeds=given.flow_seeds)
    rows = run(settings, given.folder)
    whole = not given.small and not given.family
    results = given.results or (RESULTS if whole else given.folder)
    results.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"settings": asdict(settings), "rows": rows}, indent=1)
    write_whole(results / f"{NAME}.json", record.encode())
    page = results / f"{NAME}.md"
    write_whole(page, write(rows, json.loads(record)["settings"]).encode())
    logging.info("%s", page)
    return page


if __name__ == "__main__":
    main()
