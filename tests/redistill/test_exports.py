"""The names that `import redistill` exports, and that it does not import torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from redistill_cache import open_archive

import redistill
from tests.small_archive import DATA, cache


@pytest.mark.parametrize("name", redistill.__all__)
def test_every_exported_name_exists(name):
    assert getattr(redistill, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = redistill.nothing


def test_dir_has_the_public_names():
    """In a new process, where nothing has been loaded yet."""
    code = "import redistill; print(*dir(redistill)); print(redistill.__version__)"
    names, version = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert names.split() == sorted(redistill.__all__)
    assert {"CachedTeacher", "ViewDataset", "losses", "open_model", "open_source", "render"} < set(names.split())
    assert version == metadata.version("redistill")


def test_the_package_runs_as_a_command():
    line = [sys.executable, "-m", "redistill", "--version"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.startswith("redistill ")


def test_objects_say_what_they_are(tmp_path):
    path = cache(tmp_path / "a.redistill.zarr", views=2)
    archive = open_archive(path)
    dataset, teacher = redistill.ViewDataset(DATA, archive), redistill.CachedTeacher(archive)
    described = f"<Archive a.redistill.zarr: 150 samples, 2 views, {archive.id[:12]}>"
    assert repr(archive) == described
    assert repr(dataset) == "<ViewDataset: 150 rows, 2 views of 32 pixels>"
    assert repr(teacher) == f"<CachedTeacher small of {described} on cpu>"


def test_importing_redistill_does_not_import_torch():
    """Processes that index a source import this package; torch would cost each of them seconds."""
    code = "import sys, redistill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
