"""The HTML report as public API: ``import hvcompile.report``, then ``hvcompile.report.write("report.html", ...)``."""

from hvcompile.explanation.report import write

__all__ = ["write"]
