"""The report of an evaluation: one HTML file without scripts, other files or network."""

from cast.evaluation.report.page import Evidence, html

__all__ = ["Evidence", "html"]
