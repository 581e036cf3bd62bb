"""Open a model from its spec string.

    torchvision:resnet50?weights=DEFAULT                  published weights, by torchvision's names
    torchvision:resnet50?weights=PATH&norm=imagenet       a file that says nothing about itself: say it here
    timm:vit_small_patch16_224?weights=pretrained         needs the extra: pip install 'redistill[timm]'
    cifar:resnet32x4?num_classes=100&weights=PATH         the networks of the distillation literature
    demo:large?num_classes=10                             small networks for 32 px images
    python:module:callable                                your own, from the command line only

Options: num_classes=, size=, norm=imagenet|cifar100|cifar10|half or mean=r,g,b&std=r,g,b, weights=, seed=.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from redistill_cache.errors import Refused, UsageError
from torch import Tensor, nn

from redistill.models import cifar, demo, libraries
from redistill.models.model_info import OPTIONS, Blueprint, ModelInfo, OpenedModel, portable
from redistill.models.weights import WeightsFile, load_into, read_weights, refuse_misfit, state_digest
from redistill.specs import Spec, did_you_mean, parse_spec

__all__ = ["open_model", "open_weights"]

FAMILIES = {
    "torchvision": libraries.torchvision_blueprint,
    "timm": libraries.timm_blueprint,
    "cifar": cifar.cifar_blueprint,
    "demo": demo.demo_blueprint,
    "python": libraries.python_blueprint,
}
RANDOM = "random"


@dataclass(frozen=True)
class Weights:
    """A state to load, where it came from, and what it says of itself. No state: the network's own."""

    source: str | None
    facts: ModelInfo
    state: Mapping[str, Tensor] | None = None
    label: str = ""


def open_model(text: str, *, num_classes: int | None = None, seed: int = 0, allow_python: bool = False) -> OpenedModel:
    """The network that a spec string means, with its weights.

    `num_classes` is the caller's knowledge (the archive's), used where neither the spec nor the weights say; `seed`
    decides fresh weights, whatever torch's global generator holds. Only a command line may set `allow_python`.
    """
    spec = parse_spec(text)
    blueprint = find(spec, allow_python=allow_python)
    spec.refuse_unknown(OPTIONS)
    asked = ModelInfo.from_options(spec)
    weights = choose_weights(spec, blueprint)
    classes = count_classes(spec, blueprint, asked, weights, num_classes)
    facts = replace(asked, num_classes=classes).over(weights.facts).over(family_facts(blueprint, weights, classes))
    if facts.norm is None:
        raise UsageError(
            f"{text!r}: the normalisation these weights were trained with is not known; add norm=imagenet, "
            f"norm=cifar100, or mean=r,g,b&std=r,g,b"
        )
    target = f"{spec.scheme}:{blueprint.name}"
    if weights.state is not None and not blueprint.carries_weights:
        # Before building: a file from anybody names the network, and must hold what it makes us allocate.
        wanted = on_meta(blueprint, classes, facts.input_size)
        refuse_misfit(wanted, weights.state, source=weights.label, target=target)
    module = build(spec, blueprint, facts, spec.take("seed", seed))
    if weights.state is not None:
        load_into(module, weights.state, source=weights.label, target=target)
    return OpenedModel(
        module=module,
        spec=text,
        name=blueprint.name,
        num_classes=classes,
        input_size=facts.input_size,
        mean=facts.norm.mean,
        std=facts.norm.std,
        weights_digest=None if weights.source is None else state_digest(module.state_dict()),
        weights_source=weights.source,
        interpolation=facts.interpolation,
        resize=facts.resize,
        portable_spec=portable(spec.scheme, spec.name, {**spec.options, "num_classes": str(classes)}),
    )


def open_weights(path: Path) -> OpenedModel:
    """The model of a file that redistill wrote: its header says which network it is."""
    text = read_weights(path).metadata.get("spec")
    if not isinstance(text, str):
        raise Refused(f"{str(path)!r} does not say which network it is of; open it as MODEL?weights={path}")
    # The header may be anybody's: it names an architecture and nothing else.
    spec = parse_spec(text)
    spec.refuse_unknown(OPTIONS - {"weights", "seed"})
    joined = "&".join([*(f"{key}={value}" for key, value in spec.options.items()), f"weights={quoted(path)}"])
    return open_model(f"{spec.scheme}:{spec.name}?{joined}")


def quoted(path: Path) -> str:
    """A path as an option's value."""
    return str(path).replace("%", "%25").replace("&", "%26")


def find(spec: Spec, *, allow_python: bool) -> Blueprint:
    if spec.scheme not in FAMILIES:
        near = did_you_mean(spec.scheme, FAMILIES)
        raise UsageError(f"{spec.text!r} is not a model; expected KIND:NAME as in 'torchvision:resnet18' ({near})")
    if spec.scheme == "python" and not allow_python:
        raise UsageError(f"{spec.text!r}: python: models run code and are taken from the command line only")
    if not spec.name:
        raise UsageError(f"{spec.text!r} names no network; expected {spec.scheme}:NAME")
    return FAMILIES[spec.scheme](spec)


def choose_weights(spec: Spec, blueprint: Blueprint) -> Weights:
    """What weights= means: a published name, a file, fresh weights on purpose, or nothing."""
    value = spec.options.get("weights")
    if value is None:
        return Weights("python" if blueprint.carries_weights else None, ModelInfo())
    if value == RANDOM:
        return Weights(RANDOM, ModelInfo())
    if value in blueprint.published_names:
        assert blueprint.published is not None
        published = blueprint.published(value)
        return Weights(published.source, published.facts, published.state, published.source)
    path = Path(value).expanduser()
    if not path.exists() and "/" not in value and not path.suffix:
        hint = did_you_mean(value, [*blueprint.published_names, RANDOM])
        raise UsageError(f"{spec.text!r}: weights={value!r} is neither a file nor published weights; {hint}")
    return weights_of_file(read_weights(path))


def weights_of_file(file: WeightsFile) -> Weights:
    where = f"the header of {str(file.path)!r}"
    return Weights("file", ModelInfo.from_json(file.metadata, where), file.state, repr(str(file.path)))


def family_facts(blueprint: Blueprint, weights: Weights, num_classes: int) -> ModelInfo:
    """What is known besides: the convention for fresh weights; for a file that says nothing, maybe less."""
    return (blueprint.bare_file if weights.source == "file" else blueprint.fresh)(num_classes)


def count_classes(spec: Spec, blueprint: Blueprint, asked: ModelInfo, weights: Weights, known: int | None) -> int:
    """The option, then the weights' own word, then the shape of their last layer, then the caller's knowledge."""
    told = weights.facts.num_classes
    if asked.num_classes is not None:
        if told not in (None, asked.num_classes):
            raise Refused(f"{spec.text!r}: num_classes={asked.num_classes}, but the weights are of {told} classes")
        return asked.num_classes
    if told is None and weights.state is not None:
        told = rows_of_head(blueprint, weights.state)
    if told is None:
        told = known
    if told is None:
        raise UsageError(f"{spec.text!r}: the number of classes is not known; add num_classes=N")
    return told


def rows_of_head(blueprint: Blueprint, state: Mapping[str, Tensor]) -> int | None:
    """How many classes a state is of: the rows of the tensor whose rows follow num_classes."""
    if blueprint.carries_weights:
        return None  # building it runs the user's code, which is done once
    probe = 1013  # no layer has this width
    for name, tensor in on_meta(blueprint, probe, None).items():
        if tensor.shape[:1] == (probe,) and name in state and state[name].ndim > 0:
            return state[name].shape[0]
    return None


def on_meta(blueprint: Blueprint, num_classes: int, size: int | None) -> dict[str, Tensor]:
    """The names and shapes of a network, without allocating it."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return blueprint.build(num_classes, size).state_dict()


def build(spec: Spec, blueprint: Blueprint, facts: ModelInfo, seed: int) -> nn.Module:
    """Build with weights that are a function of the seed alone."""
    assert facts.num_classes is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return blueprint.build(facts.num_classes, facts.input_size).float()
        except (ValueError, AssertionError) as error:
            if isinstance(error, UsageError) or blueprint.carries_weights:
                raise
            raise UsageError(f"{spec.text!r}: {error}") from error
