"""The whole of redistill in a few minutes on a CPU: a teacher, its archive, students, and a teacher that errs."""

from __future__ import annotations

from redistill.demo.run import LOSSES, Summary, run_demo

__all__ = ["LOSSES", "Summary", "run_demo"]
