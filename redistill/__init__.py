"""redistill: knowledge distillation without paying for the teacher twice."""
