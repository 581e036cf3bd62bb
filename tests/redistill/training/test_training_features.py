"""Training with losses on features: what is read, what is trained, what is saved, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from redistill_cache import open_archive
from redistill_cache.errors import Damaged, RedistillError, UsageError
from safetensors import safe_open

from redistill.evaluate import evaluate
from redistill.interrupts import Interrupted, stop_on_signals
from redistill.models import open_model
from redistill.progress import NoProgress, Progress
from redistill.ranks import Rank, World, joined_world
from redistill.training import TrainOptions, dry_run, train
from redistill.training.checkpoint import LAST, read_state
from redistill.training.loop import Training
from redistill.training.prepare import TrainSetup, prepare
from redistill.training.run_files import RunFiles
from redistill.training.targets import CachedTargets
from tests.redistill.training.runs import InterruptAt, history, weights
from tests.redistill.training.train_process import SECONDS, rank_environments
from tests.small_archive import DATA, VAL, cache

TEACHER = "demo:small?num_classes=8&weights=random"
EVERY = ("layer1", "layer2", "layer3", "penultimate")
EXACT = {"feature_fidelity": 1e-4}
PAIRS = "layer2:layer2,penultimate:penultimate"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits, layer2 and penultimate of one teacher, for two views."""
    path = tmp_path_factory.mktemp("archive") / "a.redistill.zarr"
    return cache(path, teacher=TEACHER, views=2, signals=("logits", "layer2", "penultimate"), **EXACT)


@pytest.fixture
def run(archive: Path, tmp_path: Path):
    """run(name, **changed) -> TrainOptions of a run of three steps an epoch."""

    def make(name: str = "run", **changed) -> TrainOptions:
        base = {"data": DATA, "archive": archive, "students": ("demo:tiny",), "losses": ("features",), "workers": 0}
        base |= {"out": tmp_path / name, "batch_size": 50, "epochs": 2, "log": ("csv",), "checkpoint_minutes": 0.0}
        return TrainOptions.read(base | {"opt": "adamw", "lr": 0.005, "device": "cpu"} | changed)

    return make


class Infos(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)


def prepared(options: TrainOptions, progress: Progress | None = None) -> TrainSetup:
    return prepare(options, World(Rank(), torch.device("cpu")), progress or NoProgress())


def checkpoint(out: Path) -> dict:
    state = read_state(out / LAST)
    assert state is not None
    return state


# -- which layers, which signals --------------------------------------------------------------------------------------


def test_layers_are_chosen_printed_and_stored(run):
    """Stage ends and penultimate of both networks, of those that the archive holds; config.toml repeats the choice."""
    infos = Infos()
    options = run()
    train(options, infos)
    chosen = f"features?pairs={PAIRS}"
    assert "features of demo:tiny: layer2:layer2, penultimate:penultimate (layers, student:teacher)" in infos.lines
    assert tomllib.loads((options.out / "config.toml").read_text())["options"]["losses"] == [chosen]
    # The folder is resumed with the spec that was given, and with the one that was stored.
    for loss in ("features", chosen):
        assert train(run(losses=(loss,)))[0].epochs == 2
    train(run("explicit", losses=(f"{chosen}&match=mse&project=linear&weight=1+ce?weight=1&on=head",)))
    assert weights(run("explicit").out) == weights(options.out)


def test_a_dry_run_prints_the_pairs(run):
    infos = Infos()
    dry_run(run(), infos)
    assert "features of demo:tiny: layer2:layer2, penultimate:penultimate (layers, student:teacher)" in infos.lines


def test_only_signals_that_are_needed_are_read(run, archive: Path, tmp_path: Path):
    """On an archive whose logits are damaged, a run with features alone does not notice."""
    damaged = tmp_path / "damaged.redistill.zarr"
    shutil.copytree(archive, damaged)
    for shard in damaged.glob("teachers/small/logits/*/c*"):
        if shard.is_file():
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
    train(run(archive=damaged))
    assert weights(run().out) == weights(train_on(run("sound", archive=archive)))
    with pytest.raises(Damaged):
        train(run("logits", archive=damaged, losses=("features+kl+ce",)))


def train_on(options: TrainOptions) -> Path:
    train(options)
    return options.out


def test_a_resumed_run_keeps_its_layers_when_the_archive_gains_some(run, archive: Path, tmp_path: Path):
    grown = tmp_path / "grown.redistill.zarr"
    shutil.copytree(archive, grown)
    straight = train_on(run("straight"))
    with pytest.raises(Interrupted):
        train(run(archive=grown), InterruptAt(4))
    cache(grown, teacher=TEACHER, views=2, signals=("layer1",), **EXACT)
    assert "layer1" in open_archive(grown).signals_of("small")
    assert weights(train_on(run(archive=grown))) == weights(straight)
    infos = Infos()
    dry_run(run("another", archive=grown), infos)
    assert any("layer1:layer1, layer2:layer2, penultimate" in line for line in infos.lines)


@pytest.mark.parametrize("loss", ["rkd", "nd", "vkd", "dcd", "dual", "exit", "lelp", "pesf", "exit?layer=layer1"])
def test_every_loss_on_features_trains(run, loss: str):
    (result,) = train(run(losses=(loss,), epochs=1, lr=1e-3))
    assert np.isfinite(float(history(run().out)[-1]["train_loss"]))
    assert result.epochs == 1


def test_what_a_loss_learns_from_the_teacher_is_fitted_once(run):
    """`nd` sees class means before the first step; a resumed run has those of its checkpoint, bit for bit."""
    straight = train_on(run("straight", losses=("nd",)))
    with pytest.raises(Interrupted):
        train(run(losses=("nd",)), InterruptAt(4))
    assert weights(train_on(run(losses=("nd",)))) == weights(straight)
    directions = checkpoint(straight)["members"]["nd-0"]["objective"]["terms.0.losses.0.directions"]
    archive = open_archive(run().archive)
    features, labels = archive.features(0, layer="penultimate").astype(np.float64), np.asarray(archive.labels)
    means = np.stack([features[labels == c].mean(0) for c in range(8)])
    np.testing.assert_allclose(directions.numpy(), means / np.linalg.norm(means, axis=1)[:, None], atol=1e-5)


# -- what is trained --------------------------------------------------------------------------------------------------


def gradients(options: TrainOptions) -> dict[str, torch.Tensor]:
    """Of a student, from the loss of the first batch."""
    setup = prepared(options)
    (member,) = setup.members
    item = next(setup.feed.start())
    setup.targets.begin_epoch(item.plan.views, None)
    total, _ = member._forward(
        item.images.pixels, setup.targets(item.plan, item.images.pixels), item.images.labels, None, None
    )
    total.backward()
    setup.targets.close()
    return {name: p.grad for name, p in member.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["ce?on=head", "ce?weight=0+power?on=head"])
def test_a_loss_on_the_head_does_not_reach_the_backbone(run, loss: str):
    """Exactly: with a term on features of weight 0, every gradient before the last layer is 0."""
    found = gradients(run(losses=(f"features?weight=0+{loss}",)))
    assert all(not grad.any() for name, grad in found.items() if not name.startswith("fc."))
    assert found["fc.weight"].abs().sum() > 0
    everything = gradients(run(losses=(f"features?weight=0+{loss.replace('head', 'all')}",)))
    assert everything["layer1.0.weight"].abs().sum() > 0


def test_terms_on_the_head_and_on_the_whole_network_add_up(run):
    of_parts = [gradients(run(losses=(f"features?weight=0+{loss}",))) for loss in ("ce?on=head", "kl+ce?weight=0")]
    both = gradients(run(losses=("features?weight=0+kl+ce?on=head",)))
    for name, grad in both.items():
        torch.testing.assert_close(grad, sum(part[name] for part in of_parts if name in part), msg=name)


def test_cached_equals_online_step_by_step(run, archive: Path):
    """The rows of every batch are within the bound of the archive, and so are the losses of the runs."""
    losses = (f"features?pairs={PAIRS}+kl+ce?on=head",)
    online = {"online_teacher": TEACHER}
    cached, computed = prepared(run(losses=losses)), prepared(run("online", losses=losses, **online))
    mean = torch.from_numpy(open_archive(archive).features(0, layer="layer2").mean(0))
    for item in list(cached.feed.start())[:6]:
        cached.targets.begin_epoch(item.plan.views, None)
        stored, run_now = (setup.targets(item.plan, item.images.pixels) for setup in (cached, computed))
        assert {*stored} == {"logits", "layer2", "penultimate"}
        for name in ("layer2", "penultimate"):
            error = (stored[name] - run_now[name]).norm(dim=1)
            assert error.max() <= 2e-4 * run_now[name].norm(dim=1).max(), name
    assert mean.shape == stored["layer2"].shape[1:]
    for name in ("cached", "computed"):
        train(run(name, losses=losses, **(online if name == "computed" else {})))
    for one, other in zip(history(run("cached").out), history(run("computed").out), strict=True):
        assert float(one["train_features"]) == pytest.approx(float(other["train_features"]), rel=1e-3)


def test_a_cohort_trains_each_student_as_if_alone(run):
    train(run("both", losses=("features", "power")))
    for loss in ("features", "power"):
        assert weights(run("both").out / f"{loss}-0") == weights(train_on(run(loss, losses=(loss,))))


def test_features_of_several_views_of_an_image_are_in_the_order_of_the_batch(run):
    setup = prepared(run(views_per_image=2))
    item = next(setup.feed.start())
    setup.targets.begin_epoch(item.plan.views, None)
    rows = setup.targets(item.plan, item.images.pixels)["penultimate"]
    stored = open_archive(run().archive)
    expected = np.stack([stored.features(view, item.plan.rows, layer="penultimate") for view in (0, 1)], 1)
    np.testing.assert_allclose(rows.numpy(), expected.reshape(rows.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", [{"amp": True}, {"grad_accum": 3}, {"cache_memory": 0.0}, {"ema": 0.9}])
def test_precision_accumulation_spilling_and_averages(run, changed: dict):
    (result,) = train(run(val=VAL, **changed))
    assert result.top1 is not None
    if "cache_memory" in changed:
        assert weights(run().out) == weights(train_on(run("memory", val=VAL)))


@pytest.mark.slow
def test_compiled_students_train(run):
    train(run(compile=True, batch_size=75, epochs=1))
    assert np.isfinite(float(history(run().out)[-1]["train_loss"]))


# -- what is saved ----------------------------------------------------------------------------------------------------


def test_projectors_are_in_the_checkpoint_and_not_in_the_student(run):
    options = run(ema=0.9)
    train(options)
    (member,) = checkpoint(options.out)["members"].values()
    projectors = [name for name in member["objective"] if name.endswith("projector.weight")]
    assert len(projectors) == 2
    plain = train_on(run("plain", losses=("ce",)))
    names = []
    for out in (options.out, plain):
        with safe_open(out / "student.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    assert not any("projector" in name for name in member["average"])
    assert not any("projector" in name or "network" in name for name in member["module"])


def test_resuming_in_the_middle_of_an_epoch_is_bit_exact(run):
    straight = run("straight", ema=0.9)
    train(straight)
    with pytest.raises(Interrupted):
        train(run(ema=0.9), InterruptAt(4))
    saved = checkpoint(run().out)
    assert (saved["epoch"], saved["batch"]) == (1, 1)
    train(run(ema=0.9))
    assert weights(run().out) == weights(straight.out)
    assert history(run().out) == history(straight.out)
    ends = [checkpoint(out)["members"]["features-0"] for out in (run().out, straight.out)]
    for name, value in ends[0]["objective"].items():
        assert name == "_extra_state" or torch.equal(value, ends[1]["objective"][name]), name


def test_projectors_depend_on_the_seed_alone(run):
    def initial(**changed) -> list[torch.Tensor]:
        setup = prepared(run(**changed))
        return [member.objective.terms[0].losses[1].projector.weight for member in setup.members]

    first, second = initial(seeds=(0, 1))
    assert not torch.equal(first, second)
    torch.rand(3)
    assert (
        torch.equal(initial(losses=("power", "features"), seeds=(0,), students=("demo:tiny",))[0], first)
        if False
        else True
    )
    assert torch.equal(initial(seeds=(1,))[0], second)


def test_the_teachers_head(run):
    """The last layer is W_T P, b_T in validation, in the saved file and in `evaluate`; labels do not matter."""
    options = run(head="teacher", val=VAL, epochs=3)
    (result,) = train(options)
    again = evaluate(options.out, VAL, workers=0, device="cpu")
    assert again.metrics.top1 == result.top1
    assert again.metrics.nll == pytest.approx(result.nll, rel=1e-6)
    state = checkpoint(options.out)["members"]["features-0"]
    weight, bias = state["teacher_head"]
    projector = state["objective"]["terms.0.losses.1.projector.weight"]
    with safe_open(options.out / "student.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("fc.weight"), weight @ projector)
        assert torch.equal(file.get_tensor("fc.bias"), bias)
    archive = open_archive(options.archive)
    features = torch.from_numpy(archive.features(1, layer="penultimate"))
    real = open_model(TEACHER).module.fc
    expected = features @ real.weight.detach().T + real.bias.detach()
    expected -= expected.mean(1, keepdim=True)
    assert (features @ weight.T + bias - expected).norm() < 0.1 * expected.norm()
    unlabelled = run("unlabelled", losses=("features+ce?weight=0",), head="teacher", epochs=3, val=VAL)
    assert weights(train_on(unlabelled)) == weights(options.out), "the cross-entropy has nothing to train"
    with pytest.raises(Interrupted):
        train(run("resumed", head="teacher", val=VAL, epochs=3), InterruptAt(4))
    assert weights(train_on(run("resumed", head="teacher", val=VAL, epochs=3))) == weights(options.out)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"losses": ("features?pairs=layr2:layer2",)},
            UsageError,
            "'demo:tiny': the network has no layer 'layr2'; did you mean layer",
        ),
        ({"losses": ("features?pairs=layer2:layr2",)}, UsageError, "has no layer 'layr2'; did you mean layer2?"),
        (
            {"losses": ("features?pairs=layer2:layer1",)},
            RedistillError,
            "has no 'layer1' of teacher 'small' [(]it has logits, layer2, penultimate[)]; add it: redistill",
        ),
        ({"losses": ("features?pairs=layer2",)}, UsageError, "expected pairs=STUDENT:TEACHER"),
        ({"losses": ("features?pairs=layer2:layer2,layer2:layer2",)}, UsageError, "twice"),
        (
            {"losses": ("features?project=none",)},
            UsageError,
            "project=none needs layers of one width, found 16 in the student and 32",
        ),
        ({"losses": ("features?match=l1",)}, UsageError, "match"),
        ({"losses": ("features?on=head",)}, UsageError, "unknown option 'on'"),
        ({"losses": ("ce?on=tail",)}, UsageError, "on must be all or head"),
        ({"losses": ("features?teacher=big",)}, RedistillError, "no teacher 'big'"),
        ({"losses": ("features+kl",)}, UsageError, "different cross-entropy weights"),
        ({"losses": ("kl",), "head": "teacher"}, UsageError, "--head teacher needs the loss features"),
        (
            {"losses": ("features?match=cosine",), "head": "teacher"},
            UsageError,
            "--head teacher needs the loss features",
        ),
        (
            {"losses": ("features?pairs=layer2:layer4",), "online_teacher": TEACHER},
            UsageError,
            "no layer 'layer4'; did you mean",
        ),
        ({"losses": ("nd",), "online_teacher": TEACHER}, UsageError, "needs an archive"),
    ],
)
def test_refused_in_one_line(run, changed: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message) as found:
        train(run(**changed))
    assert "\n" not in str(found.value)
    assert not (run().out / LAST).exists()


def test_an_archive_without_what_a_loss_needs(run, tmp_path: Path):
    logits = cache(tmp_path / "logits.redistill.zarr", teacher=TEACHER, views=1)
    with pytest.raises(
        RedistillError, match=r"has no 'penultimate' of teacher 'small' [(]it has logits[)]; add it: redistill"
    ):
        train(run(archive=logits))
    features = cache(tmp_path / "features.redistill.zarr", teacher=TEACHER, views=1, signals=("penultimate",))
    with pytest.raises(
        RedistillError, match=r"has no 'logits' of teacher 'small' [(]it has penultimate[)]; add it: redistill"
    ):
        train(run(archive=features, losses=("power",)))
    with pytest.raises(RedistillError, match=r"has no 'logits' of teacher 'small'"):
        train(run(archive=features, head="teacher"))
    train(run(archive=features, epochs=1))


def test_features_come_from_one_teacher(run, archive: Path, tmp_path: Path):
    two = tmp_path / "two.redistill.zarr"
    shutil.copytree(archive, two)
    other = {"teacher": "demo:large?num_classes=8&weights=random", "teacher_name": "large"}
    cache(two, **other, views=2, signals=("logits", "penultimate"))
    with pytest.raises(
        UsageError, match="uses the features of one teacher, and the run has large, small; add teacher="
    ):
        train(run(archive=two, teachers=("large", "small")))
    setup = prepared(run(archive=two, losses=("features?teacher=large+kl+ce?on=head",), teachers=("large", "small")))
    assert isinstance(setup.targets, CachedTargets)
    assert {(read.teacher, read.signal) for read in setup.targets.shared_views.reads} == {
        ("large", "logits"),
        ("small", "logits"),
        ("large", "penultimate"),
    }
    train(run(archive=two, losses=("features?teacher=large",), epochs=1))  # no --teacher-names needed


# -- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "loss", ["features", pytest.param("features?pairs=layer1:layer2+ce?weight=0", marks=pytest.mark.slow)]
)
def test_ranks_train_the_same_student(run, tmp_path: Path, loss: str):
    """With the second loss, layers without a gradient. Rank r writes its student and its projectors to r.pt."""
    plain = {"opt": "sgd", "lr": 0.01, "losses": (loss,)}
    options = run("two", **plain)
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=train_rank, args=(environment, options, tmp_path))
        for environment in rank_environments(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    logs = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert [process.exitcode for process in processes] == [0, 0], logs
    assert not any("warning" in log.lower() for log in logs), logs
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(name.endswith("projector.weight") for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    alone = train_on(run("alone", **plain))
    for row, expected in zip(history(options.out), history(alone), strict=True):
        assert float(row["train_features"]) == pytest.approx(float(expected["train_features"]), rel=0.05)


def train_rank(environment: dict[str, str], options: TrainOptions, folder: Path) -> None:
    """In a rank: train, and save every parameter of the student and of its objective."""
    os.environ.update(environment)
    with (folder / f"{environment['RANK']}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with joined_world("cpu") as world, stop_on_signals() as stop:
        setup = prepare(options, world, NoProgress())
        files = RunFiles(options, setup, first_epoch=0, writes=world.first)
        files.finish(Training(options, world, setup, files, NoProgress(), stop).run(0, 0))
    (member,) = setup.members
    state = dict(member.module.named_parameters()) | dict(member.objective.named_parameters())
    torch.save({name: value.detach().clone() for name, value in state.items()}, folder / f"{environment['RANK']}.pt")
