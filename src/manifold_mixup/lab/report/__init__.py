"""From records to what people look at: one self-contained page, and a still figure of the spiral."""

from manifold_mixup.lab.report.page import write_report
from manifold_mixup.lab.report.pictures import write_figure

__all__ = ["write_figure", "write_report"]
