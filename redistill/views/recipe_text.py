"""A recipe as text for readers: the operations with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["recipe_text", "settings_text"]


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Of a recipe as an archive stores it, which may be any JSON."""
    ops = recipe.get("ops", [])
    parts = []
    for op in ops if isinstance(ops, list) else [ops]:
        if not isinstance(op, dict):
            parts.append(str(op))
            continue
        settings = settings_text({name: value for name, value in op.items() if name != "op"})
        parts.append(f"{op.get('op', '?')} ({settings})" if settings else str(op.get("op", "?")))
    return f"{', then '.join(parts) or 'none'}; {recipe.get('size', '?')} pixels"


def settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
