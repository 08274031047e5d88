"""Stage evaluation/report: one HTML page about a student and its personas."""

from opencharacter.evaluation.report.stage import build, estimate

__all__ = ["build", "estimate"]
