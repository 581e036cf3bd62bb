"""`torchvision:NAME`: torchvision's image classifiers; weights by name (DEFAULT, IMAGENET1K_V2, ...) or from a file."""

from __future__ import annotations

from functools import partial
from typing import Any

from redistill_cache.errors import Refused, UsageError
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms import InterpolationMode

from redistill.models.blueprint import Blueprint, Published
from redistill.models.facts import IMAGENET, Facts, Norm
from redistill.specs import Spec, did_you_mean
from redistill.wording import first_line

__all__ = ["blueprint"]

# Their default initialisation is announced to change, with a warning that is not the user's business.
INITIALISED = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}


def classifiers() -> list[str]:
    import torchvision

    return list_models(module=torchvision.models)  # type: ignore[no-any-return]


def build(name: str, num_classes: int, input_size: int | None = None) -> nn.Module:
    # Vision transformers have a position for every patch: their size is part of the network.
    extra: dict[str, Any] = {"image_size": input_size} if name.startswith("vit_") and input_size else {}
    return get_model(name, weights=None, num_classes=num_classes, **extra, **INITIALISED.get(name, {}))  # type: ignore[no-any-return]


def declared(weights: Any) -> Facts:  # noqa: ANN401  # a member of an enum that torchvision makes per model
    """What torchvision declares of published weights."""
    preset = weights.transforms()
    interpolation = preset.interpolation
    return Facts(
        num_classes=len(weights.meta["categories"]),
        input_size=preset.crop_size[0],
        norm=Norm(tuple(preset.mean), tuple(preset.std)),
        interpolation=interpolation.value if isinstance(interpolation, InterpolationMode) else None,
        resize=preset.resize_size[0],
    )


def fetch(name: str, label: str) -> Published:
    weights = get_model_weights(name)[label]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a proxy, half a file, a wrong hash: each comes as its own class
        raise Refused(
            f"cannot download {label} of torchvision:{name} ({first_line(error)}); "
            f"download {weights.url} elsewhere and give the file as weights=PATH"
        ) from error
    return Published(state, declared(weights), f"torchvision:{weights}")


def convention(num_classes: int) -> Facts:
    """What torchvision trains all its classifiers with."""
    del num_classes
    return Facts(norm=IMAGENET, interpolation="bilinear")


def blueprint(spec: Spec) -> Blueprint:
    known = classifiers()
    if spec.name not in known:
        raise UsageError(f"unknown network 'torchvision:{spec.name}'; {did_you_mean(spec.name, known)}")
    labels = tuple(get_model_weights(spec.name).__members__)
    return Blueprint(
        name=spec.name,
        build=partial(build, spec.name),
        published=partial(fetch, spec.name) if labels else None,
        published_names=("DEFAULT", *labels) if labels else (),
        fresh=convention,
    )
