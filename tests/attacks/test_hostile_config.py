"""A config.toml or recipe of a stranger: one line, within a second of CPU time and 200 MB, and it chooses no paths."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redistill_cache.errors import UsageError

from redistill.strict_toml import read_toml
from redistill.training.options import TrainOptions, locations, read_config
from redistill.views import parse_recipe
from tests.attacks.measure import start_peak

LIMIT = 1 << 18


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "key of 50,000 parts": (text("[options]\n" + ".".join(["a"] * 50_000) + " = 1"), "50000 parts"),
    "header of 50,000 parts": (text("[" + ".".join(["a"] * 50_000) + "]"), "50000 parts"),
    "quoted parts": (text("[options]\n" + " . ".join(['"a.\\""', "'b'"] * 15_000) + " = 1"), "30000 parts"),
    "parts after a string that ends in five quotes": (
        text("a = \"\"\"x\"\"\"\"\"\nb = '''y'''''\n" + ".".join(["c"] * 50_000) + " = 1"),
        "50000 parts",
    ),
    "parts after a comment with a quote": (text('a = 1 # "\n' + ".".join(["c"] * 50_000) + " = 1"), "50000 parts"),
    "parts after an escaped quote": (text('a = "\\\\"\n' + ".".join(["c"] * 50_000) + ' = "x"'), "50000 parts"),
    "deep arrays": (text("[options]\nseeds = " + "[" * 100_000 + "]" * 100_000), "values, more than the limit"),
    "arrays of depth 2,000": (text("[options]\nseeds = " + "[" * 2000 + "]" * 2000), "nested 2000 deep"),
    "deep tables": (text("[options]\nx = " + "{a=" * 2000 + "1" + "}" * 2000), "nested 2000 deep"),
    "100,000 values": (text("[options]\nseeds = [" + "1," * 100_000 + "]"), "values, more than the limit"),
    "100,000 keys": (text("\n".join(f"a{k}=1" for k in range(30_000))), "values, more than the limit"),
    "a gigabyte": (lambda path: os.truncate(os.open(path, os.O_RDWR | os.O_CREAT), 1 << 30), "1073741824 bytes"),
    "spaces": (text(" " * (LIMIT - 1)), "expected a table"),
    "a string without an end": (text('a = """' + "\\\\" * 100_000), "not readable TOML"),
    "an integer of a hundred thousand digits": (text("[options]\nepochs = " + "9" * 100_000), "not readable TOML"),
    "a hexadecimal integer that cannot be printed": (
        text("[options]\nepochs = 0x" + "f" * 100_000),
        "an integer does not fit 64 bits",
    ),
    "bytes that are not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe") and None, "not readable TOML"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a link to an endless file": (link_to("/dev/zero"), "not a regular file"),
    "a link to itself": (link_to("config.toml"), "symbolic link"),
    "a folder": (lambda path: path.mkdir(), "not a regular file"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_in_one_line_within_limits(tmp_path: Path, name: str):
    path = tmp_path / "config.toml"
    attack, message = ATTACKS[name]
    attack(path)
    for read in (read_config, lambda path: parse_recipe(str(path)) if name != "spaces" else read_config(path)):
        peak, start = start_peak(), time.thread_time()  # not that of threads which tests before left
        with pytest.raises(UsageError) as refusal:
            read(path)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 500
        assert time.thread_time() - start < 1
        assert peak() < 200


def test_an_endless_file_is_refused_by_its_kind():
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)  # noqa: PTH116
    with pytest.raises(UsageError, match="/dev/zero is not a regular file"):
        read_config(Path("/dev/zero"))


@pytest.mark.parametrize(
    "value",
    ["5", "[5]", "[[1]]", "{a = 1}", "1979-05-27T07:32:00Z", "inf", "nan", "true", '"?"', '["?=", ""]'],
)
@pytest.mark.parametrize("option", ["students", "online_teacher", "epochs", "lr", "data", "out", "losses", "log"])
def test_a_value_of_any_type_is_refused_in_one_line_or_taken(tmp_path: Path, option: str, value: str):
    path = tmp_path / "config.toml"
    path.write_text(f"[options]\n{option} = {value}\n")
    required = {"data": "d", "archive": "a", "students": ["demo:tiny"], "out": "r"}
    refusal = ""
    try:
        stored = read_config(path)
        locations(stored)
        assert TrainOptions.read(required | stored).members
    except UsageError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_honest_files_are_read(tmp_path: Path):
    """Dots and brackets in strings, comments, numbers, dates and versions do not count."""
    path = tmp_path / "config.toml"
    path.write_text(
        '# a.b.c.d.e.f.g.h.i.j.k ["\n'
        'versions = {torch = "2.1.2.3.4.5.6.7.8.9.10", x.y = 1.5}\n'
        "path = '../../../../a.b.c.d.e.f.g.h.i.j [[[[[[[[[[' # it's\n"
        'text = """[[[[[[[[[[ a.b.c.d.e.f.g.h.i.j.k ""\\""""\n'
        f"seeds = [{', '.join(['1.5'] * 1000)}]\n"
    )
    tables = read_toml(path, "file")
    assert tables["path"].endswith("[[[[[[[[[[")
    assert len(tables["seeds"]) == 1000
