"""Weights on disk: formats that are read, files that are refused, and that saved files are plain safetensors."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from redistill_cache.errors import Refused, UsageError
from torch import nn

from redistill.models import demo, open_model, open_weights, read_weights, save_weights, state_digest


class RunsCode:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def network() -> nn.Module:
    return demo.build("tiny", 5)


def same(one: nn.Module, other: nn.Module) -> bool:
    return state_digest(one.state_dict()) == state_digest(other.state_dict())


def test_a_saved_file_loads_with_load_file(tmp_path: Path):
    saved = network()
    save_weights(saved, tmp_path / "w.safetensors", {"spec": "demo:tiny?num_classes=5"})
    plain = network()
    assert not same(saved, plain)
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    assert same(saved, plain)


def test_a_saved_student_opens_from_only_its_file(tmp_path: Path):
    student = open_model("cifar:resnet8?num_classes=7&norm=imagenet", seed=3)
    save_weights(student.module, tmp_path / "a&b%20.safetensors", student.metadata())
    again = open_weights(tmp_path / "a&b%20.safetensors")
    assert same(student.module, again.module)
    assert (again.name, again.num_classes, again.mean, again.std) == ("resnet8", 7, student.mean, student.std)
    assert again.weights_digest == state_digest(student.module.state_dict())
    assert str(tmp_path) not in json.dumps(again.describe())


def test_wrapped_modules_are_saved_under_plain_names(tmp_path: Path):
    inner = network()
    save_weights(nn.DataParallel(inner), tmp_path / "w.safetensors", {})
    assert read_weights(tmp_path / "w.safetensors").state.keys() == inner.state_dict().keys()


def test_tied_and_strided_tensors_are_saved(tmp_path: Path):
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    tied["a"].bias.data = torch.arange(6.0)[::2]
    save_weights(tied, tmp_path / "w.safetensors", {})
    state = read_weights(tmp_path / "w.safetensors").state
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert state["a.bias"].tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 240, "accuracy": torch.tensor(0.7)},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}},
    ],
    ids=["bare", "crd", "parallel", "nested"],
)
def test_torch_files_of_training_scripts_are_unwrapped(tmp_path: Path, wrap):
    saved = network()
    torch.save(wrap(saved.state_dict()), tmp_path / "w.pth")
    opened = open_model(f"demo:tiny?weights={tmp_path / 'w.pth'}")
    assert same(saved, opened.module)
    assert (opened.num_classes, opened.weights_source) == (5, "file")


def test_half_precision_files_become_float32(tmp_path: Path):
    saved = network()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in saved.state_dict().items()}, tmp_path / "w.pt")
    opened = open_model(f"demo:tiny?weights={tmp_path / 'w.pt'}")
    assert {p.dtype for p in opened.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_no_pickled_code_is_run(tmp_path: Path, zip_format: bool):
    torch.save({"model": RunsCode(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(Refused, match="Python objects besides tensors"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(Refused, match="torch file"):
        read_weights(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


def damaged_files() -> dict[str, bytes]:
    whole = safetensors.torch.save(network().state_dict(), metadata={"redistill": "{}"})
    return {
        "empty": b"",
        "text": b"not weights at all, but a long enough line of text",
        "truncated": whole[:-10],
        "header only": whole[:400],
        "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
        "zip": b"PK\x03\x04" + b"\0" * 100,
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, kind: str):
    path = tmp_path / "w.safetensors"
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(Refused) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", ["[]", "{", '{"a":NaN}', "[" * 5000, '{"x":"' + "y" * (1 << 21) + '"}'])
def test_a_hostile_header_is_refused(tmp_path: Path, header: str):
    safetensors.torch.save_file(network().state_dict(), tmp_path / "w.safetensors", metadata={"redistill": header})
    with pytest.raises(Refused, match="header"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"spec": "python:os:getcwd"}, "command line"),
        ({"spec": "cifar:resnet8?weights=/etc/passwd"}, "unknown option"),
        ({"spec": 3}, "'spec' must be a string, found 3"),
        ({}, "does not name its network"),
        ({"spec": "demo:tiny?num_classes=5", "mean": [0, 0, 0]}, "'std' is missing"),
        ({"spec": "demo:tiny?num_classes=5", "mean": "0,0,0", "std": [1, 1, 1]}, "3 finite numbers, found '0,0,0'"),
        ({"spec": "demo:tiny?num_classes=5", "interpolation": "sharp"}, "bicubic or .*found 'sharp'"),
        ({"spec": "demo:tiny?num_classes=5", "resize": True}, "an integer from 1 to .* found True"),
        ({"spec": "demo:tiny?num_classes=5", "mean": [0, 0, 0], "std": [1, 0, 1]}, "above 0"),
        ({"spec": "demo:tiny?num_classes=5", "input_size": 10**9}, "an integer from 1 to"),
        ({"spec": "demo:tiny?num_classes=6", "num_classes": 5}, "found 5 classes"),
        ({"spec": "cifar:wrn_994_99?num_classes=1000000&norm=half"}, "does not hold the weights"),
        ({"spec": "demo:tiny?num_classes=1000000"}, "expected"),
    ],
)
def test_the_header_is_validated(tmp_path: Path, metadata, message: str):
    save_weights(network(), tmp_path / "w.safetensors", metadata)
    with pytest.raises((Refused, ValueError), match=message) as caught:
        open_weights(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_keys_and_shapes_that_do_not_match_are_named(tmp_path: Path):
    state = network().state_dict()
    torch.save({f"x.{k}" if k.startswith("layer3") else k: v for k, v in state.items()}, tmp_path / "w.pt")
    with pytest.raises(Refused, match=r"5 missing \(layer3.0.weight, .*and 2 more\) and 6 extra \(x.layer3"):
        open_model(f"demo:tiny?weights={tmp_path / 'w.pt'}")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(Refused, match=r"fc.weight is \(5, 32\), expected \(9, 32\)"):
        open_model(f"demo:tiny?num_classes=9&weights={tmp_path / 'w.pt'}")


def test_old_files_without_batch_counters_load(tmp_path: Path):
    state = {k: v for k, v in network().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    assert open_model(f"demo:tiny?weights={tmp_path / 'w.pt'}").num_classes == 5


def test_the_digest_depends_on_the_weights_and_not_on_the_file(tmp_path: Path):
    saved = network()
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    save_weights(saved, tmp_path / "w.safetensors", {})
    opened = {name: open_model(f"demo:tiny?weights={tmp_path / name}") for name in ("w.pt", "w.safetensors")}
    assert opened["w.pt"].weights_digest == opened["w.safetensors"].weights_digest == state_digest(saved.state_dict())
    assert state_digest(saved.to(memory_format=torch.channels_last).state_dict()) == opened["w.pt"].weights_digest
    saved.get_parameter("fc.bias").data[0] += 1e-7
    assert state_digest(saved.state_dict()) != opened["w.pt"].weights_digest


def test_saving_replaces_the_file_atomically(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    for _ in range(2):
        saved = network()
        save_weights(saved, path, {})
    assert state_digest(read_weights(path).state) == state_digest(saved.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert stat.S_ISREG(path.lstat().st_mode)


# -- files that cost more than their size, or wait --------------------------------------------------------------------


class Zeros:
    """A pickle of a hundred bytes that asks for 256 MiB of zeros; torch allows the name."""

    def __reduce__(self):
        return bytearray, (1 << 28,)


def compressed_file(path: Path) -> None:
    """256 MiB of zeros in a megabyte: torch reads compressed entries and never writes them."""
    torch.save({"w": torch.zeros(1 << 26)}, path)
    data = path.with_name("deflated")
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as small:
        for entry in stored.infolist():
            with stored.open(entry) as source, small.open(entry.filename, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    data.replace(path)


def empty_tensors(path: Path) -> None:
    """A million tensors without elements, in a file that is a header alone."""
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % i for i in range(1_000_000)) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def zip_entries(path: Path) -> None:
    """A directory of a million empty entries, with 64-bit lengths."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0) + b"ab"
    directory = entry * 1_000_000
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1_000_000, 1_000_000, len(directory), 0)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(directory + end)


COSTLY = {
    "compressed": (compressed_file, "would take more memory than its size"),
    "zeros": (lambda path: torch.save({"w": Zeros()}, path), "would take more memory than its size"),
    "legacy zeros": (
        lambda path: torch.save({"w": Zeros()}, path, _use_new_zipfile_serialization=False),
        "would take more memory than its size",
    ),
    "empty tensors": (empty_tensors, "a header of .* more than the limit"),
    "many tensors": (
        lambda path: torch.save({str(i): torch.zeros(0) for i in range(60_000)}, path),
        "describes its tensors in more than",
    ),
    "zip entries": (zip_entries, "describes its tensors in more than"),
    "pipe": (os.mkfifo, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
}

READ = """
import json, resource, sys
from pathlib import Path
from redistill.models import read_weights
from redistill_cache.errors import Refused
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_weights(Path(path))
    except Refused as error:
        print(Path(path).name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error, sep="|", flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """For each costly file that was refused in a process of its own: how much memory it took in KiB, and the error."""
    folder = tmp_path_factory.mktemp("costly")
    for kind, (build, _) in COSTLY.items():
        build(folder / kind)
    command = [sys.executable, "-c", READ, *(str(folder / kind) for kind in COSTLY)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = (line.split("|", 2) for line in result.stdout.splitlines())
    return {kind: (int(kilobytes), error) for kind, kilobytes, error in lines}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_file_that_costs_more_than_its_size_is_refused_before_it_is_read(
    refusals: dict[str, tuple[int, str]], kind: str
):
    kilobytes, error = refusals[kind]
    assert re.search(COSTLY[kind][1], error)
    assert kilobytes < 100_000


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ],
    ids=["coo", "csr", "nested", "meta", "complex", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_real_numbers_are_refused(tmp_path: Path, tensor):
    torch.save(network().state_dict() | {"fc.bias": tensor()}, tmp_path / "w.pth")
    with pytest.raises(Refused, match=r"expected dense tensors .*: fc.bias$"):
        open_model(f"demo:tiny?weights={tmp_path / 'w.pth'}")


# -- checkpoints of timm and Lightning, files with several networks ---------------------------------------------------


def test_a_training_checkpoint_of_timm_opens(tmp_path: Path):
    """The layout of timm.utils.CheckpointSaver, whose arguments are an argparse.Namespace."""
    saved, average = network(), network()
    checkpoint = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": saved.state_dict(),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(model="resnet18", mean=None, scale=[0.08, 1.0]),
        "metric": 71.3,
    }
    torch.save(checkpoint, tmp_path / "w.pth.tar")
    text = f"demo:tiny?weights={tmp_path / 'w.pth.tar'}"
    assert same(open_model(text).module, saved)
    torch.save(checkpoint | {"state_dict_ema": average.state_dict()}, tmp_path / "w.pth.tar")
    with pytest.raises(Refused, match="several networks: state_dict, state_dict_ema; choose one with key=NAME"):
        open_model(text)
    assert same(open_model(f"{text}&key=state_dict").module, saved)
    assert same(open_model(f"{text}&key=state_dict_ema").module, average)
    assert "key" not in open_model(f"{text}&key=state_dict_ema").portable_spec


def test_a_namespace_may_hold_no_code(tmp_path: Path):
    torch.save(
        {"args": argparse.Namespace(x=RunsCode(tmp_path / "ran")), "model": network().state_dict()}, tmp_path / "w"
    )
    with pytest.raises(Refused, match="Python objects besides tensors"):
        read_weights(tmp_path / "w")
    assert not (tmp_path / "ran").exists()


def test_a_lightning_module_with_several_networks_needs_the_name_of_one(tmp_path: Path):
    student, teacher = network(), network()
    parts = {"student": student, "teacher": teacher}
    state = {f"{part}.{name}": v for part, module in parts.items() for name, v in module.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1}}, tmp_path / "w")
    text = f"demo:tiny?num_classes=5&weights={tmp_path / 'w'}"
    with pytest.raises(Refused, match="choose one of its parts with key=student or key=teacher"):
        open_model(text)
    assert same(open_model(f"{text}&key=teacher").module, teacher)
    with pytest.raises(Refused, match="has no part 'model'; its names begin with student, teacher"):
        open_model(f"{text}&key=model")
    with pytest.raises(UsageError, match="key= names a part of a weights file"):
        open_model("demo:tiny?num_classes=5&weights=random&key=teacher")


def test_settings_beside_the_weights_are_no_network(tmp_path: Path):
    saved = network()
    torch.save({"model": {"depth": 8}, "state_dict": saved.state_dict()}, tmp_path / "w")
    assert same(open_model(f"demo:tiny?weights={tmp_path / 'w'}").module, saved)


def test_a_mapping_that_contains_itself_is_refused(tmp_path: Path):
    loop: dict[str, object] = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "w")
    with pytest.raises(Refused, match="found also model"):
        read_weights(tmp_path / "w")
