"""What each family of models (torchvision, timm, cifar, ...) has to say of one of its members."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from redistill.models.facts import Facts

__all__ = ["Blueprint", "Published"]


@dataclass(frozen=True)
class Published:
    """Weights that a library offers under a name."""

    state: Mapping[str, Tensor]
    facts: Facts
    source: str


def nothing_known(num_classes: int) -> Facts:
    del num_classes
    return Facts()


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """How to make a model, and what is known of it in each case."""

    name: str
    build: Callable[[int, int | None], nn.Module]
    """(num_classes, input_size) -> the network with fresh weights."""
    published: Callable[[str], Published] | None = None
    """weights=NAME -> what the library publishes under it; None: nothing is published."""
    published_names: tuple[str, ...] = ()
    fresh: Callable[[int], Facts] = nothing_known
    """num_classes -> the convention for a network that starts from fresh weights."""
    bare_file: Callable[[int], Facts] = nothing_known
    """num_classes -> what is known of weights from a file that says nothing about itself."""
    carries_weights: bool = False
    """The network comes with weights of its own (python: callables load theirs themselves)."""
