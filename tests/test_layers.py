"""The architecture, read off the imports: one direction, no circles, no torch below, no printing above.

redistill_cli -> redistill -> redistill_cache -> numpy, zarr, numcodecs
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "redistill_cache": ROOT / "cache" / "redistill_cache",
    "redistill": ROOT / "redistill",
    "redistill_cli": ROOT / "cli" / "redistill_cli",
}
# What each package may import of ours; redistill_cache also names every third party it may use.
BELOW = {
    "redistill_cache": {"redistill_cache"},
    "redistill": {"redistill", "redistill_cache"},
    "redistill_cli": set(PACKAGES),
}
CACHE_THIRD_PARTIES = {"numpy", "zarr", "numcodecs", "google_crc32c", "platformdirs"}
RENDERERS = {"typer", "click", "rich", "tqdm"}


def module_files(package: str) -> dict[str, Path]:
    """Dotted module name -> file, for every module of one of our packages."""
    top = PACKAGES[package]
    names = {}
    for file in sorted(top.rglob("*.py")):
        parts = [package, *file.relative_to(top).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = {name: file for package in PACKAGES for name, file in module_files(package).items()}


def imports(module: str, tree: ast.AST, known: Mapping[str, Path]) -> set[str]:
    """The modules a module imports, also for types only. `from a import b` is a.b where that is a module, else a."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = known[module].name == "__init__.py"
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found


IMPORTS = {name: imports(name, ast.parse(file.read_text()), MODULES) for name, file in MODULES.items()}


def test_there_is_something_to_look_at():
    assert {"redistill_cache.storage", "redistill.specs", "redistill_cli.app"} <= MODULES.keys()
    assert "redistill_cache.errors" in IMPORTS["redistill.specs"]


def test_imports_run_one_way():
    for module, imported in IMPORTS.items():
        ours = {name for name in imported if name.split(".")[0] in PACKAGES}
        upward = {name for name in ours if name.split(".")[0] not in BELOW[module.split(".")[0]]}
        assert not upward, f"{module} imports {sorted(upward)} from a layer above it"


def test_the_archive_library_needs_numpy_and_zarr_only():
    allowed = CACHE_THIRD_PARTIES | sys.stdlib_module_names | {"redistill_cache"}
    for module in module_files("redistill_cache"):
        here = allowed | ({"fsspec"} if module == "redistill_cache.fetching" else set())  # only when a URL needs it
        foreign = {name for name in IMPORTS[module] if name.split(".")[0] not in here}
        assert not foreign, f"{module} imports {sorted(foreign)}; redistill_cache may use {CACHE_THIRD_PARTIES}"


def find_circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_circles():
    circle = find_circle({name: imported & MODULES.keys() for name, imported in IMPORTS.items()})
    assert circle is None, f"modules import each other in a circle: {' -> '.join(circle or [])}"


def test_a_circle_would_be_found():
    tree = ast.parse("def late():\n    from . import b")
    known = {"p": Path("p/__init__.py"), "p.a": Path("p/a.py"), "p.b": Path("p/b.py")}
    assert imports("p.a", tree, known) == {"p.b"}
    assert find_circle({"p.a": {"p.b"}, "p.b": {"p.a"}}) is not None


def printing_or_exiting(tree: ast.AST) -> list[str]:
    """Calls that write to a terminal or end the process, and imports of libraries whose business that is."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            ends = {"print", "exit", "quit", "breakpoint", "sys.exit", "os._exit", "os.abort", "SystemExit"}
            writes = {"sys.stdout.write", "sys.stderr.write"}
            if name in ends | writes:
                found.append(f"{name}() in line {node.lineno}")
        elif isinstance(node, ast.Raise) and node.exc is not None and ast.unparse(node.exc) == "SystemExit":
            found.append(f"raise SystemExit in line {node.lineno}")
        elif isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in RENDERERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RENDERERS:
            found.append(f"from {node.module} import")
    return found


@pytest.mark.parametrize("package", ["redistill_cache", "redistill"])
def test_only_the_command_line_prints_or_exits(package: str):
    for module, file in module_files(package).items():
        found = printing_or_exiting(ast.parse(file.read_text()))
        assert not found, f"{module} must leave printing and exiting to redistill_cli: {found}"


def test_printing_and_exiting_would_be_found():
    code = "print(1)\nsys.exit()\nraise SystemExit\nraise SystemExit(2)\nfrom rich.table import Table\nimport tqdm"
    assert len(printing_or_exiting(ast.parse(code))) == 6


def test_importing_the_archive_library_loads_no_torch():
    code = "import json, sys, redistill_cache; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "redistill_cache" in loaded
    assert not loaded & {"torch", "torchvision", "redistill", "redistill_cli"}
