"""Options on the command line: derived from the dataclasses, documented, and without waiting for torch."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer.main
from redistill_cache.errors import UsageError
from redistill_cli.app import app
from redistill_cli.options import collect, describe_default
from redistill_cli.train import read_options

from redistill.caching import CacheOptions
from redistill.optim import OptimConfig
from redistill.option_fields import options_of
from redistill.training import TrainOptions
from redistill.training.options import POWER, locations


def leaves(commands: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Every command by what is typed, those of groups included."""
    found: dict[str, Any] = {}
    for name, command in commands.items():
        full = f"{path} {name}".strip()
        found |= leaves(command.commands, full) if hasattr(command, "commands") else {full: command}
    return found


COMMANDS = leaves(typer.main.get_command(app).commands)
ADDRESS = "http://127.0.0.1:9/a.redistill.zarr"
REQUIRED = ("folder:images", "--archive", "a.zarr", "--student", "demo:tiny", "--out", "run")


def parse(options: type, command: str, *arguments: str) -> dict[str, Any]:
    """The options of a dataclass from a command line."""
    with COMMANDS[command].make_context(command, list(arguments)) as context:
        return collect(options, context.params)


def train_options(
    *arguments: str, config: Path | None = None, preset: str | None = None, trust: bool = False
) -> TrainOptions:
    return read_options(parse(TrainOptions, "train", *arguments), config, preset, trust_config=trust)[0]


def help_text(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with COMMANDS[command].make_context(command, [], resilient_parsing=True) as context:
        return context.get_help()


def test_missing_options_have_the_defaults_of_the_dataclasses():
    assert train_options(*REQUIRED) == TrainOptions(
        data="folder:images", archive=Path("a.zarr"), students=("demo:tiny",), out=Path("run"), allow_python=True
    )
    values = parse(CacheOptions, "cache-teacher", "folder:images", "--teacher", "demo:tiny", "--out", "a.zarr")
    assert values == {"data": "folder:images", "teacher": "demo:tiny", "out": Path("a.zarr")}
    assert (CacheOptions(**values).views, CacheOptions(**values).signals) == (None, ("logits",))


def test_several_values_are_repeated_or_separated_by_commas():
    options = train_options(
        *(*REQUIRED, "--student", "demo:small", "--loss", "kl", "--loss", "ce", "--seed", "3", "--seed", "4"),
        *("--teacher-names", "a, b", "--log", "csv", "--sched", "multistep", "--decay-milestones", "10,20.5"),
    )
    assert options.students == ("demo:tiny", "demo:small")
    assert (options.losses, options.seeds) == (("kl", "ce"), (3, 4))
    assert (options.teachers, options.log) == (("a", "b"), ("csv",))
    assert options.optim.decay_milestones == (10, 20.5)
    values = parse(
        CacheOptions,
        "cache-teacher",
        "x",
        "--teacher",
        "t",
        "--out",
        "a",
        "--signals",
        "layer3,logits,layer3,penultimate",
    )
    assert CacheOptions(**values).signals == ("logits", "layer3", "penultimate")
    with pytest.raises(UsageError, match="--signals must be 1 to 64 of a-z"):
        CacheOptions(**values | {"signals": ("Layer 3",)})
    with pytest.raises(UsageError, match="--extend-views needs --views"):
        CacheOptions(**values | {"extend_views": True})


@pytest.mark.parametrize(("arguments", "amp"), [((), None), (("--amp",), True), (("--no-amp",), False)])
def test_amp_is_on_off_or_decided_by_the_device(arguments: tuple[str, ...], amp: bool | None):
    assert train_options(*REQUIRED, *arguments).amp is amp


def test_switches():
    options = train_options(*REQUIRED, "--compile", "--no-channels-last", "--no-decay-norm-bias")
    assert (options.compile, options.channels_last, options.optim.no_decay_norm_bias) == (True, False, True)


def test_the_command_line_wins_over_the_config_over_the_preset_over_defaults(tmp_path: Path):
    config = tmp_path / "config.toml"
    stored = {"data": "d", "archive": "a", "students": ["demo:tiny"], "out": "r", "lr": 0.2, "batch_size": 128}
    config.write_text(tomli_w.dumps({"options": stored}))
    options = train_options("--lr", "0.3", "--out", "again", config=config, preset="cifar-kd", trust=True)
    assert (options.optim.lr, options.batch_size, options.optim.opt) == (0.3, 128, "sgd")
    assert (options.optim.momentum, options.out) == (OptimConfig().momentum, Path("again"))
    assert train_options("--out", "r", config=config, preset="cifar-kd", trust=True).optim.lr == 0.2
    assert train_options(*REQUIRED, preset="cifar-kd").optim.lr == 0.05


CONFIG = {
    "data": "folder:/etc",
    "archive": "http://127.0.0.1/a",
    "val": "wds:http://192.168.0.1/x.tar",
    "students": ["cifar:resnet8?weights=/home/x.pt"],
    "out": "/etc/cron.d",
    "lr": 0.2,
}


def test_a_config_chooses_no_path_or_address_that_the_command_line_does_not_repeat(tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text(tomli_w.dumps({"options": CONFIG}))
    arguments = ("mine", "--archive", "a.zarr", "--val", "val", "--student", "demo:tiny", "--out", "run")
    options = train_options(*arguments, config=config)
    assert (options.data, str(options.archive), options.val, options.optim.lr) == ("mine", "a.zarr", "val", 0.2)
    with pytest.raises(UsageError) as refusal:
        train_options("--out", "run", config=config)
    for part in (
        *("DATA 'folder:/etc'", "--archive 'http://127.0.0.1/a'", "--val 'wds:http://192.168.0.1/x.tar'"),
        *("--student ['cifar:resnet8?weights=/home/x.pt']", "repeat it on the command line, or add --trust-config"),
    ):
        assert part in str(refusal.value)
    for repeated in (("mine", "--archive"), ("mine", "--archive", "a.zarr", "--val", "v", "--out")):
        with pytest.raises(UsageError, match="add --trust-config"):
            train_options(*repeated, "a.zarr", config=config)


@pytest.mark.parametrize("trust", [False, True])
def test_a_config_never_chooses_the_folder_to_write(tmp_path: Path, trust: bool):
    config = tmp_path / "config.toml"
    config.write_text(tomli_w.dumps({"options": CONFIG | {"archive": "a"}}))
    with pytest.raises(UsageError, match="train needs --out"):
        train_options("d", "--archive", "a", "--val", "v", "--student", "demo:tiny", config=config, trust=trust)
    assert train_options("--out", "mine", config=config, trust=True).out == Path("mine")


@pytest.mark.parametrize(
    ("model", "elsewhere"),
    [
        *(("torchvision:resnet18?weights=DEFAULT", False), ("demo:tiny?num_classes=5&weights=random", False)),
        *(("timm:vit_tiny_patch16_224.augreg_in21k?weights=pretrained", False), ("cifar:resnet8?weights=w.pt", True)),
        *(("cifar:resnet8?weights=%2Fetc", True), ("timm:hf-hub:user/net", True), ("torchvision:../x", True)),
    ],
)
def test_a_model_in_a_config_has_no_weights_in_a_file(model: str, elsewhere: bool):
    assert ("students" in locations({"students": ["demo:tiny", model]})) is elsewhere
    assert ("online_teacher" in locations({"online_teacher": model})) is elsewhere


def test_missing_options_are_named():
    with pytest.raises(UsageError, match="train needs --archive, --student, --out"):
        train_options("folder:images")
    with pytest.raises(UsageError, match="train needs DATA, --archive"):
        train_options()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_repeated_option_is_refused_unless_it_takes_several_values(command: str):
    for option in COMMANDS[command].params:
        if option.param_type_name != "option" or option.is_eager:
            continue
        twice = [option.opts[0], *([] if option.is_flag else ["1"])] * 2
        try:
            COMMANDS[command].make_context(command, twice)
            message = ""
        except Exception as error:  # noqa: BLE001  an option that may be repeated fails later, on a missing argument
            message = str(error)
        assert ("is given 2 times and takes one value" in message) != option.multiple, option.opts


def test_both_forms_of_a_switch_are_one_option():
    with pytest.raises(UsageError, match="--amp/--no-amp is given 2 times and takes one value; give it once"):
        train_options(*REQUIRED, "--amp", "--no-amp")


@pytest.mark.parametrize("option", ["--cohort", "--ce-weight"])
def test_removed_options_are_unknown(option: str):
    with pytest.raises(Exception, match="No such option") as refusal:
        train_options(*REQUIRED, option, "1")
    assert getattr(refusal.value, "exit_code", None) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str):
    for parameter in COMMANDS[command].params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize(
    "text",
    [
        f"[default: {POWER}]",
        "--opt sgd|nesterov|adam|adamw",
        "[default: nesterov]",
        "[default: on CUDA only]",
        "--no-decay-norm-bias",
        "--archive PATH|URL",
        "[default: csv,tensorboard]",
    ],
)
def test_help_shows_names_choices_and_defaults(text: str, monkeypatch: pytest.MonkeyPatch):
    assert text in re.sub(r"\s+", " ", help_text("train", monkeypatch))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_default(command: str, monkeypatch: pytest.MonkeyPatch):
    """Text in brackets is not taken for markup; the default of a derived option is in its dataclass."""
    help_ = re.sub(r"\s+", "", help_text(command, monkeypatch))
    for parameter in COMMANDS[command].params:
        texts = re.findall(r"\[default: .*?\]", parameter.help)
        texts += [f"[default: {parameter.default}]"] if parameter.default not in (None, False, ()) else []
        for text in texts:
            assert parameter.help.replace(" ", "").partition("[default")[0] in help_
            assert re.sub(r"\s+", "", text) in help_, parameter.name
    derived = {"train": TrainOptions, "cache-teacher": CacheOptions}.get(command)
    for option in options_of(derived).values() if derived is not None else ():
        if option.help and option.default not in (None, False, MISSING, (), ""):
            assert "[default: " in describe_default(option), option.field


def test_help_in_a_pipe_has_the_defaults():
    command = [sys.executable, "-m", "redistill_cli", "train", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Epochs of training. [default: 240]" in process.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_pasted_from_a_terminal_of_80_columns(command: str, monkeypatch: pytest.MonkeyPatch):
    examples = re.split(r"\n\n(?:Arguments|Options):", help_text(command, monkeypatch).partition("Examples:")[2])[0]
    lines = re.sub(r" \\\n +", " ", examples).splitlines()
    pasted = [line.strip() for line in lines if re.match(r" +(redistill|torchrun) ", line)]
    assert pasted
    assert max(len(line) for line in examples.splitlines()) <= 76
    for line in pasted:
        words = shlex.split(re.sub(r"^torchrun .*? -m redistill_cli", "redistill", line))
        length = 1 + len(command.split())
        assert words[1:length] == command.split()
        with COMMANDS[command].make_context(command, words[length:]):
            pass


def test_help_loads_no_torch():
    code = "import sys, typer.main, redistill_cli.app as a; typer.main.get_command(a.app); print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(process.stdout.split())
    assert "redistill.training.options" in loaded
    assert not loaded & {"torch", "torchvision"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--archve", "a"), "No such option: --archve"),
        (
            ("train", "d", "--archive", ADDRESS, "--student", "demo:tiny", "--out", "r", "--opt", "sdg"),
            "did you mean sgd",
        ),
        (("train", "d", "--archive", "a", "--student", "demo:tiny", "--out", "r", "--preset", "quik"), "mean quick?"),
        (("train", "d", "--archive", "a", "--out", "r"), "train needs --student"),
        (
            ("train", "d", "--archive", "a", "--student", "demo:tiny", "--out", "r", "--loss", "kl?weight"),
            "expected key=value",
        ),
        (("cache-teacher", "d", "--teacher", "t", "--out", "o", "--codec", "linaer"), "did you mean linear"),
        (("evaluat",), "No such command 'evaluat'"),
    ],
)
def test_a_typo_is_reported_before_torch_is_imported(arguments: tuple[str, ...], message: str):
    code = f"""import sys, redistill_cli.__main__ as m
sys.argv = ["redistill", *{arguments!r}]
try: m.main()
except SystemExit as end: code = end.code
print(code, "torch" in sys.modules)"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout.split() == ["2", "False"], process.stderr
    assert message in process.stderr


def test_the_entry_point_sets_variables_before_numpy_is_imported():
    code = "import sys, redistill_cli.__main__; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
