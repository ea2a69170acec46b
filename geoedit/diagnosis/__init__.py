"""Will a straight edit work? Predicted at every site before any edit, then checked by making it."""

from geoedit.diagnosis.result import Diagnosis, Expectation, Predictor, SiteSummary
from geoedit.diagnosis.run import diagnose

__all__ = ["Diagnosis", "Expectation", "Predictor", "SiteSummary", "diagnose"]
