"""The effect report: what each technique of your own run gives."""

from eke_report.callback import Report
from eke_report.paired import paired
from eke_report.text import render

__all__ = ["Report", "paired", "render"]
