"""`python:module:callable`: a user's own network. Runs the user's code, so only a command line may ask for it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from redistill_cache.errors import UsageError
from torch import nn

from redistill.models.blueprint import Blueprint
from redistill.specs import Spec

__all__ = ["blueprint"]


def find(spec: Spec) -> Callable[..., Any]:
    module_name, _, attribute = spec.name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{spec.text!r}: expected 'python:module:callable', as in 'python:my_models:build'")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"{spec.text!r}: cannot import {module_name!r} ({error}); is its folder in PYTHONPATH?"
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"{spec.text!r}: {attribute!r} is not a callable of {module_name!r}")
    return found  # type: ignore[no-any-return]


def blueprint(spec: Spec) -> Blueprint:
    """The callable is given num_classes where it takes such an argument, and nothing else."""
    function = find(spec)
    takes_classes = "num_classes" in inspect.signature(function).parameters

    def build(num_classes: int, input_size: int | None = None) -> nn.Module:
        del input_size
        module = function(num_classes=num_classes) if takes_classes else function()
        if not isinstance(module, nn.Module):
            raise UsageError(f"{spec.text!r}: expected a torch.nn.Module, found {type(module).__name__}")
        return module

    return Blueprint(name=spec.name.replace(":", "."), build=build, carries_weights=True)
