"""Results for people: tables on a terminal and one self-contained page."""

from geoedit.report.page import page
from geoedit.report.terminal import expectation_table, geometry_table, predictor_table, site_table
from geoedit.report.verdict import Verdict, verdict

__all__ = [
    "Verdict",
    "expectation_table",
    "geometry_table",
    "page",
    "predictor_table",
    "site_table",
    "verdict",
]
