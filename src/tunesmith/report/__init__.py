"""The HTML report of a run: takes a run directory's files, gives one self-contained page, `report.html`."""

from __future__ import annotations

from ._page import render_report, write_report

__all__ = ["render_report", "write_report"]
