"""What README and docs/ say can be typed is typed: Python is run, commands are parsed by the program itself."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from redistill_cli.app import app

from tests.small_archive import DATA, cache

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of a shell block that runs redistill, with or without torchrun."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^torchrun .*? -m redistill_cli", "redistill", line.partition("  #")[0].strip())
                if line.startswith("redistill "):
                    found.append(line)
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str):
    """The options exist and take what they are given; nothing is run."""
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    with command.make_context(name, arguments) as context:
        assert context.params


def test_there_are_commands_to_parse():
    assert len(commands()) > 12


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At reduced size: a small archive stands for the demo's."""
    (tmp_path / "demo").mkdir()
    cache(tmp_path / "demo" / "teacher.redistill.zarr", views=1)
    monkeypatch.chdir(tmp_path)
    found = blocks("README.md", "python")
    assert found
    for block in found:
        code = re.sub(r'images = "synthetic[^"]*"', f'images = "{DATA}"', block)
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_every_number_has_its_script():
    for script in re.findall(r"python (bench/\w+\.py)", (ROOT / "README.md").read_text()):
        assert (ROOT / script).exists(), script


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")  # of Lightning, about torch
@pytest.mark.parametrize("name", ["plain_torch", "timm_loop", "lightning_loop"])
def test_the_loops_of_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    import runpy

    package = name.partition("_loop")[0]
    if package != name:
        pytest.importorskip(package, reason=f"examples/{name}.py is for users of {package}: pip install {package}")
    cache(tmp_path / "a.redistill.zarr", views=2)
    module = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    module["main"](str(tmp_path / "a.redistill.zarr"), DATA, 2)
    assert "epoch 2: loss 0." in capsys.readouterr().out
