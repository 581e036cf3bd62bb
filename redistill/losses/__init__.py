"""Distillation losses on logits: the power divergence first, and the family around it."""

from __future__ import annotations

from redistill.losses.power import capped_fraction, is_bounded, power_divergence

__all__ = ["capped_fraction", "is_bounded", "power_divergence"]
