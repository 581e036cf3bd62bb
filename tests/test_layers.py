"""The architecture, checked on the imports: one direction, no cycles, no torch in the archive, only the CLI prints.

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
# The packages of this project that each of them may import.
MAY_IMPORT = {
    "redistill_cache": {"redistill_cache"},
    "redistill": {"redistill", "redistill_cache"},
    "redistill_cli": set(PACKAGES),
}
# `python -m redistill` starts the command line; nothing imports it.
ENTRY_POINTS = {"redistill.__main__"}
# All third parties of redistill_cache.
CACHE_THIRD_PARTIES = {"numpy", "zarr", "numcodecs", "google_crc32c", "platformdirs"}
# Modules that are imported only where they are needed: by an address, by an encoder, by an encoder on CUDA.
CACHE_LAZY_THIRD_PARTIES = {
    "redistill_cache.protocols": {"fsspec"},
    "redistill_cache.sending": {"fsspec"},
    "redistill_cache.tokens": {"huggingface_hub"},
    "redistill_cache.codecs.compiled": {"numba"},
    "redistill_cache.codecs.triton_sweeps": {"torch", "triton"},
}
RENDERERS = {"typer", "click", "rich", "tqdm"}


def module_files(package: str) -> dict[str, Path]:
    """Dotted module name -> file, for every module of a package of this project."""
    top = PACKAGES[package]
    names = {}
    for file in sorted(top.rglob("*.py")):
        parts = [package, *file.relative_to(top).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = {name: file for package in PACKAGES for name, file in module_files(package).items()}


def imports(module: str, tree: ast.AST, known: Mapping[str, Path]) -> set[str]:
    """The modules a module imports, at any depth. `from a import b` is a.b where that is a module, else a.

    Imports under TYPE_CHECKING count as well: two modules that need each other's types belong together.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = known[module].name == "__init__.py"
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                names.add(inner if inner in known else base)
    return names


IMPORTS = {name: imports(name, ast.parse(file.read_text()), MODULES) for name, file in MODULES.items()}


def test_modules_and_imports_are_found():
    assert {"redistill_cache.storage", "redistill.specs", "redistill_cli.app"} <= MODULES.keys()
    assert "redistill_cache.errors" in IMPORTS["redistill.specs"]


def test_imports_run_one_way():
    for module, imported in IMPORTS.items():
        ours = {name for name in imported if name.split(".")[0] in PACKAGES}
        if module in ENTRY_POINTS:
            continue
        upward = {name for name in ours if name.split(".")[0] not in MAY_IMPORT[module.split(".")[0]]}
        assert not upward, f"{module} imports {sorted(upward)} from a layer above it"


def test_nothing_imports_an_entry_point():
    assert not [module for module, imported in IMPORTS.items() if imported & ENTRY_POINTS]


def test_third_parties_of_the_archive_library():
    allowed = CACHE_THIRD_PARTIES | sys.stdlib_module_names | {"redistill_cache"}
    for module in module_files("redistill_cache"):
        lazy = CACHE_LAZY_THIRD_PARTIES.get(module, set())
        foreign = {name for name in IMPORTS[module] if name.split(".")[0] not in allowed | lazy}
        assert not foreign, f"{module} imports {sorted(foreign)}; redistill_cache may use {CACHE_THIRD_PARTIES}"


def find_cycle(graph: Mapping[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_imports_have_no_cycle():
    cycle = find_cycle({name: imported & MODULES.keys() for name, imported in IMPORTS.items()})
    assert cycle is None, f"modules import each other in a cycle: {' -> '.join(cycle or [])}"


def test_a_cycle_is_found():
    assert find_cycle({"p.a": {"p.b"}, "p.b": {"p.a"}}) is not None
    assert find_cycle({"p.a": {"p.b"}, "p.b": set()}) is None


@pytest.mark.parametrize(
    "code",
    [
        "import p.b",
        "from p.b import name",
        "def late():\n    from . import b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import Name",
    ],
)
def test_every_kind_of_import_counts(code: str):
    known = {"p": Path("p/__init__.py"), "p.a": Path("p/a.py"), "p.b": Path("p/b.py")}
    assert imports("p.a", ast.parse(code), known) & known.keys() == {"p.b"}


def printing_or_exiting(tree: ast.AST) -> list[str]:
    """Calls that write to a terminal or end the process, and imports of libraries that do."""
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            ends = {"print", "exit", "quit", "breakpoint", "sys.exit", "os._exit", "os.abort", "SystemExit"}
            writes = {"sys.stdout.write", "sys.stderr.write"}
            if name in ends | writes:
                problems.append(f"{name}() in line {node.lineno}")
        elif isinstance(node, ast.Raise) and node.exc is not None and ast.unparse(node.exc) == "SystemExit":
            problems.append(f"raise SystemExit in line {node.lineno}")
        elif isinstance(node, ast.Import):
            problems += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in RENDERERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RENDERERS:
            problems.append(f"from {node.module} import")
    return problems


@pytest.mark.parametrize("package", ["redistill_cache", "redistill"])
def test_only_the_command_line_prints_or_exits(package: str):
    for module, file in module_files(package).items():
        problems = printing_or_exiting(ast.parse(file.read_text()))
        assert not problems, f"{module} must leave printing and exiting to redistill_cli: {problems}"


def test_printing_and_exiting_are_found():
    code = "print(1)\nsys.exit()\nraise SystemExit\nraise SystemExit(2)\nfrom rich.table import Table\nimport tqdm"
    assert len(printing_or_exiting(ast.parse(code))) == 6


def test_importing_the_archive_library_loads_no_torch():
    code = "import json, sys, redistill_cache; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "redistill_cache" in loaded
    assert not loaded & {"torch", "torchvision", "redistill", "redistill_cli"}
