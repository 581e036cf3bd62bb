"""Distillation losses on logits: the power divergence first, and the family around it."""
