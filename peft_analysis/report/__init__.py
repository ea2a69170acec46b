"""What an analysis found: a table, figures, a page, a file."""

from peft_analysis.report.columns import COLUMNS, Column
from peft_analysis.report.result import Report

__all__ = ["COLUMNS", "Column", "Report"]
