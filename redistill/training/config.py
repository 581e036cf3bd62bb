"""config.toml: everything a run was told and found, so that `redistill train --config` repeats it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redistill_cache.errors import UsageError
from redistill_cache.files import LOCAL

__all__ = ["CONFIG", "read_config", "to_toml", "write_config"]

CONFIG = "config.toml"


def write_config(folder: Path, options: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> None:
    """`options` as `TrainOptions.to_json` gives them; `facts` are tables that are read by people only."""
    LOCAL.publish(folder / CONFIG, to_toml({"options": options, **facts}).encode())


def read_config(path: Path) -> dict[str, Any]:
    """The options of a config.toml."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no configuration at {path}; a run folder holds it as {CONFIG}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} is not TOML that can be read: {error}") from None
    options = found.get("options")
    if not isinstance(options, dict):
        raise UsageError(f"{path}: expected a table [options], as in the {CONFIG} of a run")
    return options


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of strings, numbers, booleans and lists of them."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{to_value(key) if not key.isidentifier() else key} = {to_value(v)}" for key, v in table.items()]
        lines.append("")
    return "\n".join(lines)


def to_value(value: Any) -> str:  # noqa: ANN401  whatever an option holds
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # inf and nan are TOML too
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_value, value))}]"
    # TOML's basic strings are JSON's, but for DEL, which must be escaped as well.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
