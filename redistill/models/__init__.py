"""Models: opened by a spec string, saved as plain safetensors."""

from redistill.models.model_info import ModelInfo, Normalise, OpenedModel
from redistill.models.open_model import open_model, open_weights
from redistill.models.weights import read_weights, save_weights, state_digest

__all__ = [
    "ModelInfo",
    "Normalise",
    "OpenedModel",
    "open_model",
    "open_weights",
    "read_weights",
    "save_weights",
    "state_digest",
]
