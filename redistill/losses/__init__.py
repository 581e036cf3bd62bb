"""Distillation losses on logits and features: the power divergence and the losses of the literature."""

from __future__ import annotations

from redistill.losses.catalogue import CATALOGUE, make_loss
from redistill.losses.controls import cwtm, dkpp, label_smoothing, tf_kd, virtual_teacher
from redistill.losses.corrections import label_revision, rc, swap_kd
from redistill.losses.curriculum import CurriculumTemperature, Schedule, Taid, TrainingProgress, taid
from redistill.losses.decoupled import dkd, nkd, rld
from redistill.losses.divergences import (
    alpha_beta,
    hellinger,
    jensen_shannon,
    kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from redistill.losses.features import Contrast, FeatureMatch, NormDirection, OrthogonalMatch
from redistill.losses.heads import AdaptedTeacher, DualHead, ExitHead, SubclassHead
from redistill.losses.hinton import bd_kd, kd, logit_mse, luminet, mld, standardize, ttm, wttm
from redistill.losses.objective import Mix, Needs, Objective, Widths
from redistill.losses.power import capped_fraction, is_bounded, power_divergence
from redistill.losses.ranking import pld, topkd
from redistill.losses.relational import dist, mlkd_batch, mlkd_class, pearson, r2kd, rkd, sinkhorn, spearman

__all__ = [
    "CATALOGUE",
    "AdaptedTeacher",
    "Contrast",
    "CurriculumTemperature",
    "DualHead",
    "ExitHead",
    "FeatureMatch",
    "Mix",
    "Needs",
    "NormDirection",
    "Objective",
    "OrthogonalMatch",
    "Schedule",
    "SubclassHead",
    "Taid",
    "TrainingProgress",
    "Widths",
    "alpha_beta",
    "bd_kd",
    "capped_fraction",
    "cwtm",
    "dist",
    "dkd",
    "dkpp",
    "hellinger",
    "is_bounded",
    "jensen_shannon",
    "kd",
    "kl",
    "label_revision",
    "label_smoothing",
    "logit_mse",
    "luminet",
    "make_loss",
    "mld",
    "mlkd_batch",
    "mlkd_class",
    "nkd",
    "pearson",
    "pld",
    "power_divergence",
    "r2kd",
    "rc",
    "reverse_kl",
    "rkd",
    "rld",
    "sinkhorn",
    "skew_kl",
    "skew_reverse_kl",
    "spearman",
    "standardize",
    "swap_kd",
    "taid",
    "tf_kd",
    "topkd",
    "total_variation",
    "ttm",
    "virtual_teacher",
    "wttm",
]
