"""An editable install, as `make` and contributors make it: its types are visible, and `python -m redistill` runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USER_CODE = """
from pathlib import Path

import redistill
import redistill_cache
import redistill_cli.options
from redistill.training import TrainOptions

archive = redistill_cache.open_archive("a.redistill.zarr")
reveal_type(archive)
reveal_type(archive.logits(view=0, rows=[1]))
dataset = redistill.ViewDataset("folder:images", archive)
reveal_type(dataset)
reveal_type(redistill.CachedTeacher(archive))
reveal_type(redistill.__version__)
reveal_type(redistill_cli.options.split("a,b"))
TrainOptions(data="d", archive=Path("a"), students=3, out=Path("x"))
"""
REVEALED = [
    *("redistill_cache.reader.Archive", "ndarray[", "redistill.views.dataset.ViewDataset"),
    *("redistill.cached_teacher.CachedTeacher", '"str"', "list[str]"),
]


@pytest.mark.slow  # installs, and reads the types of torch
def test_types_are_visible_to_a_user_of_an_editable_install(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        line = list(map(str, command))
        return subprocess.run(
            line, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=280, check=False
        )

    assert run(sys.executable, "-m", "venv", "venv").returncode == 0
    python = tmp_path / "venv/bin/python"
    [folder] = (tmp_path / "venv/lib").glob("python*/site-packages")
    (folder / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    installed = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", "--editable", ROOT)
    assert installed.returncode == 0, installed.stderr
    (tmp_path / "user.py").write_text(USER_CODE)
    checked = run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "user.py").stdout
    revealed = [line for line in checked.splitlines() if "Revealed type is" in line]
    assert len(revealed) == len(REVEALED), checked
    for expected, line in zip(REVEALED, revealed, strict=True):
        assert expected in line
    errors = [line for line in checked.splitlines() if ": error:" in line]
    assert len(errors) == 1, "one wrong call, and no missing stubs"
    assert 'Argument "students" to "TrainOptions" has incompatible type "int"' in errors[0]
    version = run(python, "-m", "redistill", "--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "redistill")
