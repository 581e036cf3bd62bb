"""`redistill archive fetch --teachers`, and what the other commands say of such a copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from redistill_cli.__main__ import main

from tests import tiny_archive
from tests.small_archive import DATA

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        monkeypatch.setattr("sys.argv", ["redistill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def test_a_copy_says_which_teachers_it_holds_and_how_to_get_another(run: Run, tmp_path: Path):
    whole, out = tmp_path / "a.redistill.zarr", tmp_path / "my copy"
    identity = tiny_archive.make(whole, teachers=("r50", "vit"))
    fetch = ("archive", "fetch", whole, out)
    for wrong, code, problem in (
        ("vit,swin", 3, "has no teacher 'swin'; teachers: r50, vit"),
        ("vit,vit", 2, "expected the names of teachers, each once, found vit,vit"),
        (",", 2, "expected the names of teachers, each once, found none"),
    ):
        assert (error := run(*fetch, "--teachers", wrong))[0] == code
        assert problem in error[2]
        assert error[2].count("\n") == 1
    assert not out.exists()

    held = "holds views 0-1 of 3, of teacher r50 none"
    assert run(*fetch, "--teachers", "vit", "--views", 2) == (0, f"{out}: id {identity}, {held}\n", "")
    shown, described = run("inspect", out)[1], json.loads(run("inspect", out, "--json")[1])
    assert f"a copy that {held}" in shown
    assert (list(described["teachers"]), described["lacking"]) == (["vit"], {"r50": 0})
    code, checked, _ = run("verify", out, "--full")
    assert (code, f"; a copy that {held}" in checked) == (0, True)
    assert json.loads(run("verify", out, "--json")[1])["lacking"] == {"r50": 0}

    train = ("train", DATA, "--archive", out, "--student", "demo:tiny", "--out", tmp_path / "run", "--device", "cpu")
    code, _, error = run(*train, "--teacher-names", "r50")
    assert (code, error.count("\n")) == (3, 1)
    assert "is a copy without teacher 'r50' of its archive" in error
    command = shlex.split(error[error.index("redistill archive fetch") :].replace("ADDRESS", str(whole)))
    assert run(*command[1:]) == (0, f"{out}: id {identity}, holds views 0-2 of 3, of teacher vit views 0-1\n", "")
    assert run(*fetch)[1] == f"{out}: id {identity}, holds views 0-2 of 3\n"
    assert "complete" in run("inspect", out)[1]


def test_the_cache_folder_lists_the_teachers_with_fewer_views(run: Run, tmp_path: Path):
    whole = tmp_path / "a.redistill.zarr"
    tiny_archive.make(whole, teachers=("r50", "vit"))
    assert run("archive", "fetch", whole, "--teachers", "vit")[0] == 0
    assert "3 of 3, r50 0" in run("archive", "cache", "list")[1]
    (listed,) = json.loads(run("archive", "cache", "list", "--json")[1])["archives"]
    assert (listed["views_held"], listed["lacking"]) == (3, {"r50": 0})
