"""docs/SHARING.md: its commands do what it says, from the lab that has an archive to the lab that trains from it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from redistill_cache import open_archive

from tests.docs.test_documents import blocks
from tests.hub_server import Hub, hub_server
from tests.s3_server import s3_server
from tests.small_archive import DATA, TEACHER, cache

# A smaller task in place of ImageNet.
SMALLER = {
    "folder:imagenet/train": f"'{DATA}'",
    "torchvision:resnet50?weights=DEFAULT": TEACHER,
    "torchvision:resnet18": "demo:tiny --epochs 1 --workers 0 --device cpu",
    "--teachers resnet50": "--teachers small",
}


@pytest.mark.slow
def test_the_commands_take_an_archive_from_one_lab_to_another(tmp_path: Path, serve):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("moto")
    path = cache(tmp_path / "teacher.redistill.zarr", views=2)
    web = tmp_path / "www"
    web.mkdir()
    address, _ = serve(web)
    with hub_server(Hub()) as hub, s3_server(tmp_path) as s3:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
        folders = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
        environment = kept | folders | hub.environment() | dict(s3)
        codes = []
        for line in "".join(blocks("docs/SHARING.md", "sh")).splitlines():
            identity = open_archive(path).id or ""
            here = {
                "/srv/www": str(web),
                "https://data.example.org": address,
                "=ID": f"={identity}",
                "TAG": identity[:16],
            }
            for name, text in (SMALLER | here).items():
                line = line.replace(name, text)
            command = shlex.split(line)
            if command[0] == "redistill":
                command[:1] = [sys.executable, "-m", "redistill_cli"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=250)
            codes.append((line, done.returncode, done.stderr))
        refused = [line for line, code, _ in codes if code == 3]
        failed = [(line, error) for line, code, error in codes if code not in (0, 3)]
    assert not failed
    assert refused == [codes[0][0]]  # the dry run that says what is missing
    assert open_archive(tmp_path / "scratch.redistill.zarr").num_views == 1
    assert (tmp_path / "runs/resnet18/report.html").exists()
    assert open_archive(tmp_path / "both.redistill.zarr").num_views == 8
    assert open_archive(tmp_path / "small.redistill.zarr").num_samples == 32
