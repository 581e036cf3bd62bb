"""README and docs/: Python blocks run, commands are parsed by the program, links and named files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from redistill_cli.app import app

from tests.small_archive import DATA, cache

ROOT = Path(__file__).resolve().parents[2]
PAGES = [str(page.relative_to(ROOT)) for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of a shell block that runs redistill, with or without torchrun."""
    lines = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^torchrun .*? -m redistill_cli", "redistill", line.partition("  #")[0].strip())
                if line.startswith("redistill "):
                    lines.append(line)
    return lines


@pytest.mark.parametrize("line", commands())
def test_documented_commands_parse(line: str):
    """The options exist and accept the values; nothing is run."""
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    with command.make_context(name, arguments) as context:
        assert context.params


def test_commands_are_documented():
    assert len(commands()) > 12


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At reduced size: with a small archive instead of the demo's."""
    (tmp_path / "demo").mkdir()
    cache(tmp_path / "demo" / "teacher.redistill.zarr", views=1)
    monkeypatch.chdir(tmp_path)
    examples = blocks("README.md", "python")
    assert examples
    for block in examples:
        code = re.sub(r'images = "synthetic[^"]*"', f'images = "{DATA}"', block)
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_modules_named_exist(page: str):
    """`training/loop.py`, `writer.py`: a file of that path, or the end of one, is in the tree."""
    files = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for name in re.findall(r"(?<![\w./])((?:\w+/)*\w+\.py)\b", (ROOT / page).read_text()):
        assert any(file == name or file.endswith(f"/{name}") for file in files), name


def test_every_number_has_its_script():
    for script in re.findall(r"python (bench/\w+\.py)", (ROOT / "README.md").read_text()):
        assert (ROOT / script).exists(), script


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")  # of Lightning, about torch
@pytest.mark.parametrize("name", ["plain_torch", "features_loop", "timm_loop", "lightning_loop"])
def test_the_loops_of_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    import runpy

    package = name.partition("_loop")[0]
    if package not in (name, "features"):
        pytest.importorskip(package, reason=f"examples/{name}.py is for users of {package}: pip install {package}")
    cache(tmp_path / "a.redistill.zarr", views=2, signals=("logits", "penultimate"))
    module = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    module["main"](str(tmp_path / "a.redistill.zarr"), DATA, 2)
    assert re.search(r"^epoch 2: loss \d\.\d+$", capsys.readouterr().out, re.M)
