"""The demo's task: ten kinds of drawn glyphs, few images for the students, many for the teacher."""

from __future__ import annotations

from pathlib import Path

__all__ = ["STUDENT_DATA", "STUDENT_NETWORK", "TEACHER_DATA", "TEACHER_NETWORK", "TEACHER_WEIGHTS", "VAL_DATA"]

DIFFICULTY = "classes=10&noise=0.3&clutter=0.2&similarity=0"
# Another seed: the teacher has never seen an image of the students.
TEACHER_DATA = f"synthetic?{DIFFICULTY}&n=30000&seed=1"
STUDENT_DATA = f"synthetic?{DIFFICULTY}&n=500"
VAL_DATA = f"synthetic?{DIFFICULTY}&n=2000&split=val"
TEACHER_NETWORK = "demo:large?num_classes=10"
STUDENT_NETWORK = "demo:small"
# Made by examples/train_demo_teacher.py.
TEACHER_WEIGHTS = Path(__file__).with_name("teacher.safetensors")
