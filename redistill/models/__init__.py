"""Models: opened by a spec string, saved as plain safetensors."""

from redistill.models.facts import Facts
from redistill.models.opened import Normalise, OpenedModel
from redistill.models.opening import open_model, open_weights
from redistill.models.weights import read_weights, save_weights, state_digest

__all__ = [
    "Facts",
    "Normalise",
    "OpenedModel",
    "open_model",
    "open_weights",
    "read_weights",
    "save_weights",
    "state_digest",
]
