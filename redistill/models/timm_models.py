"""`timm:NAME`: timm's models, when the extra is installed; weights=pretrained or from a file."""

from __future__ import annotations

from functools import partial
from typing import Any

from redistill_cache.errors import Refused, UsageError
from torch import nn

from redistill.models.blueprint import Blueprint, Published
from redistill.models.facts import Facts, Norm
from redistill.specs import Spec, did_you_mean
from redistill.wording import first_line

__all__ = ["blueprint"]


def load_timm() -> Any:  # noqa: ANN401  # a module
    try:
        import timm
    except ImportError:
        raise UsageError("timm: models need timm, which is not installed; pip install 'redistill[timm]'") from None
    return timm


def declared(config: dict[str, Any]) -> Facts:
    """What a model's pretrained_cfg says."""
    size, crop = config.get("input_size"), config.get("crop_pct")
    side = size[-1] if size else None
    mean, std = config.get("mean"), config.get("std")
    return Facts(
        num_classes=config.get("num_classes") or None,
        input_size=side,
        norm=Norm(tuple(mean), tuple(std)) if mean and std else None,
        interpolation=config.get("interpolation") or None,
        resize=round(side / crop) if side and crop else None,
    )


def build(name: str, num_classes: int, input_size: int | None = None) -> nn.Module:
    del input_size  # timm's models take their size from their own configuration
    return load_timm().create_model(name, pretrained=False, num_classes=num_classes)  # type: ignore[no-any-return]


def fetch(name: str, label: str) -> Published:
    """Any label but a path means timm's own weights; which ones is part of a timm name (`resnet50.a1_in1k`)."""
    del label
    try:
        model = load_timm().create_model(name, pretrained=True)
    except Exception as error:  # the hub's client has errors of its own, and those of its transport
        raise Refused(
            f"cannot download the weights of timm:{name} ({first_line(error)}); download them elsewhere and give "
            f"the file as weights=PATH"
        ) from error
    tag = model.pretrained_cfg.get("tag") or "pretrained"
    return Published(model.state_dict(), declared(model.pretrained_cfg), f"timm:{name.partition('.')[0]}.{tag}")


def blueprint(spec: Spec) -> Blueprint:
    timm = load_timm()
    # Only timm's own names: its "hf-hub:" and "local-dir:" prefixes would fetch a configuration from anywhere.
    base, _, tag = spec.name.partition(".")
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        hint = hint if hint.startswith("did you mean") else "timm.list_models() lists them"  # there are a thousand
        raise UsageError(f"unknown network 'timm:{spec.name}'; {hint}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and spec.name not in tagged:
        raise UsageError(f"timm:{base} has no weights tagged {tag!r}; {did_you_mean(spec.name, tagged)}")
    config = timm.get_pretrained_cfg(spec.name)
    known = declared(config.to_dict()) if config is not None else Facts()

    def own_config(num_classes: int) -> Facts:
        return Facts(num_classes=num_classes).over(known)

    return Blueprint(
        name=spec.name,
        build=partial(build, spec.name),
        published=partial(fetch, spec.name),
        published_names=("DEFAULT", "pretrained"),
        fresh=own_config,
        bare_file=own_config,
    )
