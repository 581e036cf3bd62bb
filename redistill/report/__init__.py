"""One page about runs: self-contained, without scripts, fit for a screen, a phone and paper."""

from __future__ import annotations

from redistill.report.page import WrittenReport, write_report

__all__ = ["WrittenReport", "write_report"]
