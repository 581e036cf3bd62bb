"""All of redistill in a few minutes on a CPU: a teacher, its archive, students, and students of a misled teacher."""

from __future__ import annotations

from redistill.demo.run import LOSSES, Summary, run_demo

__all__ = ["LOSSES", "Summary", "run_demo"]
