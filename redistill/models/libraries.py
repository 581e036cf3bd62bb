"""The networks of torchvision, timm and the user.

torchvision:NAME          image classifiers; weights by name (DEFAULT, IMAGENET1K_V2, ...) or from a file
timm:NAME                 if the extra is installed; weights=pretrained or from a file
python:module:callable    the user's own; it runs the user's code, so only the command line accepts it
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torchvision
from redistill_cache.errors import Refused, UsageError
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms import InterpolationMode

from redistill.models.model_info import IMAGENET, Blueprint, ModelInfo, Norm, Published
from redistill.specs import Spec, did_you_mean, first_line

__all__ = ["python_blueprint", "timm_blueprint", "torchvision_blueprint"]

# torchvision announces another default initialisation for these, with a warning that the user cannot act on.
INITIALISED = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}


def build_torchvision(name: str, num_classes: int, input_size: int | None = None) -> nn.Module:
    # Vision transformers have an embedding for every patch position, so the size is part of the network.
    extra: dict[str, Any] = {"image_size": input_size} if name.startswith("vit_") and input_size else {}
    return get_model(name, weights=None, num_classes=num_classes, **extra, **INITIALISED.get(name, {}))  # type: ignore[no-any-return]


def torchvision_info(weights: Any) -> ModelInfo:  # noqa: ANN401  # a member of one of torchvision's enums
    """What torchvision declares about published weights."""
    preset = weights.transforms()
    interpolation = preset.interpolation
    return ModelInfo(
        num_classes=len(weights.meta["categories"]),
        input_size=preset.crop_size[0],
        norm=Norm(tuple(preset.mean), tuple(preset.std)),
        interpolation=interpolation.value if isinstance(interpolation, InterpolationMode) else None,
        resize=preset.resize_size[0],
        top1=published_top1(weights.meta),
    )


def published_top1(meta: Mapping[str, Any]) -> float | None:
    """On ImageNet, for which all of torchvision's classifiers are trained."""
    percent = meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return None if percent is None else round(percent / 100, 6)


def fetch_torchvision(name: str, label: str, size: int | None = None) -> Published:
    del size  # they have the size they were trained at
    weights = get_model_weights(name)[label]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a proxy, a partial file, a wrong hash: each has its own class
        raise Refused(
            f"cannot download {label} of torchvision:{name} ({first_line(error)}); "
            f"download {weights.url} elsewhere and pass the file as weights=PATH"
        ) from error
    return Published(state, torchvision_info(weights), f"torchvision:{weights}")


def torchvision_blueprint(spec: Spec) -> Blueprint:
    known = list_models(module=torchvision.models)
    if spec.name not in known:
        raise UsageError(f"unknown network 'torchvision:{spec.name}'; {did_you_mean(spec.name, known)}")
    labels = tuple(get_model_weights(spec.name).__members__)

    def fresh_info(num_classes: int) -> ModelInfo:
        """torchvision trains all its classifiers with these."""
        del num_classes
        return ModelInfo(norm=IMAGENET, interpolation="bilinear")

    return Blueprint(
        name=spec.name,
        build=partial(build_torchvision, spec.name),
        published=partial(fetch_torchvision, spec.name) if labels else None,
        published_names=("DEFAULT", *labels) if labels else (),
        fresh_info=fresh_info,
    )


# -- timm -------------------------------------------------------------------------------------------------------------


def load_timm() -> Any:  # noqa: ANN401  # a module
    try:
        import timm
    except ImportError:
        raise UsageError("timm: models need timm, which is not installed; pip install 'redistill[timm]'") from None
    return timm


def timm_info(config: dict[str, Any]) -> ModelInfo:
    """What timm declares in a model's pretrained_cfg."""
    size, crop = config.get("input_size"), config.get("crop_pct")
    side = size[-1] if size else None
    mean, std = config.get("mean"), config.get("std")
    return ModelInfo(
        num_classes=config.get("num_classes") or None,
        input_size=side,
        norm=Norm(tuple(mean), tuple(std)) if mean and std else None,
        interpolation=config.get("interpolation") or None,
        resize=round(side / crop) if side and crop else None,
    )


def timm_size(name: str, size: int | None) -> dict[str, Any]:
    """The argument for networks whose size is part of the network; the others accept images of any size."""
    config = load_timm().get_pretrained_cfg(name)
    is_fixed = config is not None and config.fixed_input_size
    return {"img_size": size} if is_fixed and size is not None and size != config.input_size[-1] else {}


def build_timm(name: str, num_classes: int, input_size: int | None = None) -> nn.Module:
    extra = timm_size(name, input_size)
    return load_timm().create_model(name, pretrained=False, num_classes=num_classes, **extra)  # type: ignore[no-any-return]


def fetch_timm(name: str, label: str, size: int | None = None) -> Published:
    """All labels mean the same weights: which ones is part of a timm name (`resnet50.a1_in1k`).

    timm resamples position embeddings where `size` is another one than the weights were trained at.
    """
    del label
    try:
        model = load_timm().create_model(name, pretrained=True, **timm_size(name, size))
    except Exception as error:  # the hub's client raises its own errors and those of its transport
        raise Refused(
            f"cannot download the weights of timm:{name} ({first_line(error)}); download them elsewhere and pass "
            f"the file as weights=PATH"
        ) from error
    tag = model.pretrained_cfg.get("tag") or "pretrained"
    return Published(model.state_dict(), timm_info(model.pretrained_cfg), f"timm:{name.partition('.')[0]}.{tag}")


def timm_blueprint(spec: Spec) -> Blueprint:
    timm = load_timm()
    # Only names that timm registers: its "hf-hub:" and "local-dir:" prefixes load a configuration from anywhere.
    base, _, tag = spec.name.partition(".")
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        hint = hint if hint.startswith("did you mean") else "timm.list_models() lists them"  # there are a thousand
        raise UsageError(f"unknown network 'timm:{spec.name}'; {hint}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and spec.name not in tagged:
        raise UsageError(f"timm:{base} has no weights tagged {tag!r}; {did_you_mean(spec.name, tagged)}")
    config = timm.get_pretrained_cfg(spec.name)
    declared = timm_info(config.to_dict()) if config is not None else ModelInfo()

    def info(num_classes: int) -> ModelInfo:
        return ModelInfo(num_classes=num_classes).or_else(declared)

    return Blueprint(
        name=spec.name,
        build=partial(build_timm, spec.name),
        published=partial(fetch_timm, spec.name),
        published_names=("DEFAULT", "pretrained"),
        fresh_info=info,
        file_info=info,
    )


# -- python -----------------------------------------------------------------------------------------------------------


def find_callable(spec: Spec) -> Callable[..., Any]:
    module_name, _, attribute = spec.name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{spec.text!r}: expected 'python:module:callable', as in 'python:my_models:build'")
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"{spec.text!r}: cannot import {module_name!r} ({error}); is its folder in PYTHONPATH?"
        ) from error
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        raise UsageError(f"{spec.text!r}: {attribute!r} is not a callable of {module_name!r}")
    return value  # type: ignore[no-any-return]


def python_blueprint(spec: Spec) -> Blueprint:
    """The callable is called with num_classes if it has that parameter, and with nothing else."""
    function = find_callable(spec)
    takes_classes = "num_classes" in inspect.signature(function).parameters

    def build(num_classes: int, input_size: int | None = None) -> nn.Module:
        del input_size
        module = function(num_classes=num_classes) if takes_classes else function()
        if not isinstance(module, nn.Module):
            raise UsageError(f"{spec.text!r}: expected a torch.nn.Module, found {type(module).__name__}")
        return module

    return Blueprint(name=spec.name.replace(":", "."), build=build, has_weights=True)
