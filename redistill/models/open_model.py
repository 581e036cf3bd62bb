"""Open a model from its spec string.

    torchvision:resnet50?weights=DEFAULT                  published weights, by torchvision's names
    torchvision:resnet50?weights=PATH&norm=imagenet       a file without a header needs the normalisation
    timm:vit_small_patch16_224?weights=pretrained         needs the extra: pip install 'redistill[timm]'
    cifar:resnet32x4?num_classes=100&weights=PATH         the networks of the distillation literature
    demo:large?num_classes=10                             small networks for 32 px images
    python:module:callable                                your own code, from the command line only

Options: num_classes=, size=, norm=imagenet|cifar100|cifar10|half or mean=r,g,b&std=r,g,b, seed=, weights=, and key= for
the part of a weights file that holds several (`key=state_dict_ema`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from redistill_cache import strict_json
from redistill_cache.errors import Refused, UsageError
from redistill_cache.storage import read_small
from redistill_cache.strict_json import Fields
from torch import Tensor, nn

from redistill.models import cifar, demo, libraries
from redistill.models.model_info import LOCAL_OPTIONS, OPTIONS, Blueprint, ModelInfo, OpenedModel, portable
from redistill.models.weights import header_of, load_into, read_weights, refuse_misfit, state_digest
from redistill.specs import Spec, did_you_mean, parse_spec

__all__ = ["meta_network", "open_model", "open_weights", "quoted"]

FAMILIES = {
    "torchvision": libraries.torchvision_blueprint,
    "timm": libraries.timm_blueprint,
    "cifar": cifar.cifar_blueprint,
    "demo": demo.demo_blueprint,
    "python": libraries.python_blueprint,
}
RANDOM = "random"
MAX_SPEC = 4096
MAX_RUN_FILE = 1 << 20
# As `train` writes it. A search, since parsing TOML of a stranger takes memory without a limit.
SIZE_IN_CONFIG = re.compile(rb"^size = ([0-9]{1,9})$", re.MULTILINE)


@dataclass(frozen=True)
class Weights:
    """A state to load, its source, and the information that comes with it. Without a state: the network's own."""

    source: str | None
    info: ModelInfo
    state: Mapping[str, Tensor] | None = None
    label: str = ""


def open_model(
    model: str | nn.Module,
    *,
    num_classes: int | None = None,
    size: int | None = None,
    norm: str | tuple[Sequence[float], Sequence[float]] | None = None,
    seed: int = 0,
    allow_python: bool = False,
) -> OpenedModel:
    """The network of a spec string with its weights, or a network of your own with the weights it has.

    `num_classes` (the archive's) is used if neither the spec nor the weights determine it; fresh weights depend on
    `seed` and not on torch's global generator. Only the command line may set `allow_python`. A network of your own
    needs `num_classes` and `norm`, the name of a normalisation or (mean, std); a spec string has them as options.
    """
    if isinstance(model, nn.Module):
        return open_spec(*own_network(model, num_classes, size, norm), num_classes, seed)
    if size is not None or norm is not None:
        raise UsageError(f"{model!r}: give size and norm as options of the spec: {model.partition('?')[0]}?size=...")
    spec = parse_spec(model)
    return open_spec(spec, find_blueprint(spec, allow_python=allow_python), num_classes, seed)


def own_network(
    module: nn.Module,
    num_classes: int | None,
    size: int | None,
    norm: str | tuple[Sequence[float], Sequence[float]] | None,
) -> tuple[Spec, Blueprint]:
    """A module in the form of a `python:` spec, named after its class."""
    name = f"{type(module).__module__}:{type(module).__qualname__}"
    options: dict[str, object] = {"num_classes": num_classes, "size": size}
    if norm is None or isinstance(norm, str):
        options["norm"] = norm
    else:
        options |= {key: ",".join(map(repr, values)) for key, values in zip(("mean", "std"), norm, strict=True)}
    given = {key: str(value) for key, value in options.items() if value is not None}
    blueprint = Blueprint(name=name.replace(":", "."), build=lambda _classes, _size: module, has_weights=True)
    return Spec("python", name, given, f"python:{name}"), blueprint


def open_spec(spec: Spec, blueprint: Blueprint, num_classes: int | None, seed: int) -> OpenedModel:
    text = spec.text
    spec.refuse_unknown(OPTIONS)
    requested = ModelInfo.from_options(spec)
    weights = choose_weights(spec, blueprint, requested)
    classes = count_classes(spec, blueprint, requested, weights, num_classes)
    fallback = (blueprint.file_info if weights.source == "file" else blueprint.fresh_info)(classes)
    info = replace(requested, num_classes=classes).or_else(weights.info).or_else(fallback)
    if info.norm is None:
        raise UsageError(
            f"{text!r}: the normalisation these weights were trained with is not known; add norm=imagenet, "
            f"norm=cifar100, or mean=r,g,b&std=r,g,b"
        )
    target = f"{spec.scheme}:{blueprint.name}"
    if weights.state is not None and not blueprint.has_weights:
        # Before building: an untrusted file names the network, and must contain what we are about to allocate.
        expected = on_meta(blueprint, classes, info.input_size)
        refuse_misfit(expected, weights.state, source=weights.label, target=target)
    module = build(spec, blueprint, info, spec.take("seed", seed))
    if weights.state is not None:
        load_into(module, weights.state, source=weights.label, target=target)
    return OpenedModel(
        module=module,
        spec=text,
        name=blueprint.name,
        num_classes=classes,
        input_size=info.input_size,
        mean=info.norm.mean,
        std=info.norm.std,
        weights_digest=None if weights.source is None else state_digest(module.state_dict()),
        weights_source=weights.source,
        interpolation=info.interpolation,
        resize=info.resize,
        portable_spec=portable(spec.scheme, spec.name, {**spec.options, "num_classes": str(classes)}),
        trained_size=None if requested.input_size is not None else info.trained_size,
        top1=info.top1,
        class_names=info.class_names,
    )


def open_weights(path: Path) -> OpenedModel:
    """The model of a file that redistill wrote: the network is named in its header."""
    metadata = read_weights(path).metadata
    if "spec" not in metadata:
        raise Refused(f"the header of {str(path)!r} does not name its network; open it as MODEL?weights={path}")
    # The header is untrusted: it may name an architecture and its options, and no other file.
    spec = parse_spec(Fields(metadata, header_of(path)).text("spec", MAX_SPEC))
    spec.refuse_unknown(OPTIONS - LOCAL_OPTIONS)
    # The header repeats the size in a field of its own; as an option, it would override the size of the training.
    kept = {key: value for key, value in spec.options.items() if key != "size" or "input_size" not in metadata}
    options = "&".join([*(f"{key}={value}" for key, value in kept.items()), f"weights={quoted(path)}"])
    return open_model(f"{spec.scheme}:{spec.name}?{options}")


def quoted(path: Path) -> str:
    """A path as the value of an option."""
    return str(path).replace("%", "%25").replace("&", "%26")


def find_blueprint(spec: Spec, *, allow_python: bool) -> Blueprint:
    if spec.scheme not in FAMILIES:
        hint = did_you_mean(spec.scheme, FAMILIES)
        raise UsageError(f"{spec.text!r} is not a model; expected KIND:NAME as in 'torchvision:resnet18' ({hint})")
    if spec.scheme == "python" and not allow_python:
        raise UsageError(f"{spec.text!r}: python: models run code and are accepted on the command line only")
    if not spec.name:
        raise UsageError(f"{spec.text!r} has no network name; expected {spec.scheme}:NAME")
    return FAMILIES[spec.scheme](spec)


def meta_network(text: str, num_classes: int, input_size: int | None) -> nn.Module:
    """The network of a spec string without memory for its weights, to look at its layers."""
    spec = parse_spec(text)
    with torch.device("meta"):
        return find_blueprint(spec, allow_python=False).build(num_classes, input_size)


def choose_weights(spec: Spec, blueprint: Blueprint, requested: ModelInfo) -> Weights:
    """The weights that the option weights= names: published, from a file, or random."""
    value = spec.options.get("weights")
    if "key" in spec.options and (value in (None, RANDOM) or value in blueprint.published_names):
        raise UsageError(f"{spec.text!r}: key= names a part of a weights file; add weights=PATH")
    if value is None:
        return Weights("python" if blueprint.has_weights else None, ModelInfo())
    if value == RANDOM:
        return Weights(RANDOM, ModelInfo())
    if value in blueprint.published_names:
        assert blueprint.published is not None
        published = blueprint.published(value, requested.input_size)
        return Weights(published.source, published.info, published.state, published.source)
    path = Path(value).expanduser()
    if not path.exists() and "/" not in value and not path.suffix:
        hint = did_you_mean(value, [*blueprint.published_names, RANDOM])
        raise UsageError(
            f"{spec.text!r}: weights={value!r} is neither a file nor the name of published weights; {hint}"
        )
    file = read_weights(path, spec.options.get("key"))
    info = ModelInfo.from_json(file.metadata, header_of(path))
    if info.class_names is not None and len(info.class_names) != info.num_classes:
        raise Refused(f"{header_of(path)}: {len(info.class_names)} class names for {info.num_classes} classes")
    if file.metadata and info.trained_size is None:
        info = info.or_else(info_of_old_run(path.parent))
    return Weights("file", info, file.state, repr(str(path)))


def info_of_old_run(folder: Path) -> ModelInfo:
    """What runs of earlier versions wrote beside their weights only: the size, if it was set, and the accuracy."""
    config, result = folder / "config.toml", folder / "result.json"
    if not (config.is_file() and result.is_file()):
        return ModelInfo()
    size = SIZE_IN_CONFIG.search(read_small(config, MAX_RUN_FILE))
    results = strict_json.parse(read_small(result, MAX_RUN_FILE), cap=MAX_RUN_FILE, where=str(result))
    values = {"top1": results.get("top1")} if isinstance(results, dict) else {}
    return ModelInfo.from_json(values | ({"trained_size": int(size[1])} if size else {}), str(result))


def count_classes(spec: Spec, blueprint: Blueprint, requested: ModelInfo, weights: Weights, default: int | None) -> int:
    """From the option, else the information with the weights, else the shape of their last layer, else `default`."""
    declared = weights.info.num_classes
    if requested.num_classes is not None:
        if declared not in (None, requested.num_classes):
            raise Refused(
                f"{spec.text!r}: expected weights for num_classes={requested.num_classes}, found {declared} classes"
            )
        return requested.num_classes
    if declared is None and weights.state is not None:
        declared = rows_of_head(blueprint, weights.state)
    if declared is None:
        declared = default
    if declared is None:
        hint = "" if weights.source else "weights=PATH for trained weights, or "
        raise UsageError(f"{spec.text!r}: the number of classes is not known; add {hint}num_classes=N")
    return declared


def rows_of_head(blueprint: Blueprint, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes of a state: the rows of the tensor whose rows depend on num_classes."""
    if blueprint.has_weights:
        return None  # building it runs the user's code, which must happen once only
    probe = 1013  # no layer has this width
    for name, tensor in on_meta(blueprint, probe, None).items():
        if tensor.shape[:1] == (probe,) and name in state and state[name].ndim > 0:
            return state[name].shape[0]
    return None


def on_meta(blueprint: Blueprint, num_classes: int, size: int | None) -> dict[str, Tensor]:
    """The names and shapes of a network's state, without allocating it."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return blueprint.build(num_classes, size).state_dict()


def build(spec: Spec, blueprint: Blueprint, info: ModelInfo, seed: int) -> nn.Module:
    """Build the network; fresh weights depend on the seed only."""
    assert info.num_classes is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return blueprint.build(info.num_classes, info.input_size).float()
        except (ValueError, AssertionError) as error:
            if isinstance(error, UsageError) or blueprint.has_weights:
                raise
            raise UsageError(f"{spec.text!r}: {error}") from error
