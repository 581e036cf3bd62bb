"""bench/study.py: its statistics, its images, and that a repeated cell gives the same numbers bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_rel

from redistill.losses.objective import Objective
from redistill.sources.open_source import open_source
from redistill.training.options import split_terms

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
from study import AUDIT, SEEDS, Cell, Setting, Study, cells, kd
from study_gradients import comparison, row_gradients
from study_report import BASE, at_same_temperature, best_of_two, compared, draw, summary
from study_tasks import TASKS, UNSEEN_FONTS, Lab, NoisyLabels, draw_fonts, glyph_in_font

from redistill.losses.catalogue import make_loss

KL = [0.40, 0.44, 0.42, 0.46, 0.41]
POWER = [0.45, 0.46, 0.49, 0.50, 0.44]
LITERAL = [0.39, 0.45, 0.40, 0.46, 0.43]


def result(task: str, top1_of_loss: dict[str, list[float]], cell: str = "a", first_seed: int = 0, **setting) -> dict:
    students = [
        {"loss": loss, "seed": first_seed + i, "top1": top1, "nll": 1.0}
        for loss, values in top1_of_loss.items()
        for i, top1 in enumerate(values)
    ]
    return {
        "cell": cell,
        "axis": "loss",
        "setting": dataclasses.asdict(Setting(task, **setting)),
        "epochs": 48,
        "images": 500,
        "students": students,
    }


def row_of(rows: list[dict], **wanted) -> dict:
    (row,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def test_p_values_are_those_of_scipy_after_holm_within_a_setting():
    rows = compared([result("fonts", {BASE: KL, "power": POWER, "literal": LITERAL})])
    differences = np.subtract(POWER, KL)
    assert row_of(rows, loss="power")["p"] == pytest.approx(ttest_1samp(differences, 0).pvalue)
    assert row_of(rows, loss="power")["p_holm"] == pytest.approx(2 * ttest_rel(POWER, KL).pvalue)
    assert row_of(rows, loss="literal")["p_holm"] == pytest.approx(ttest_rel(LITERAL, KL).pvalue)
    assert row_of(rows, loss="power")["difference"] == pytest.approx(differences.mean())
    assert row_of(rows, loss=BASE)["p"] is None


def test_rows_of_other_settings_are_not_compared():
    rows = compared([result("fonts", {BASE: KL}), result("fonts", {"power": POWER}, views=1)])
    assert row_of(rows, loss="power")["difference"] is None


def test_more_seeds_of_a_loss_are_paired_by_seed_and_name_their_cells():
    first = result("fonts", {BASE: KL, "power": POWER})
    more = result("fonts", {"power": KL, BASE: LITERAL}, cell="b", first_seed=5)
    row = row_of(compared([more, first]), loss="power")
    assert row["p"] == pytest.approx(ttest_rel(POWER + KL, KL + LITERAL).pvalue)
    assert (row["seeds"], sorted(row["cells"])) == (10, ["a", "b"])


def test_the_summary_pairs_the_seeds_of_all_tasks_at_the_centre():
    results = [result("fonts", {BASE: KL, "power": POWER}), result("digits", {BASE: LITERAL, "power": KL})]
    lines = summary(compared([*results, result("fonts", {BASE: KL, "power": KL}, views=1)]))
    line = row_of(lines, loss="power")
    assert line["p"] == pytest.approx(ttest_rel(POWER + KL, KL + LITERAL).pvalue)
    assert (line["tasks"], line["better"], line["worse"]) == (2, 1, 0)


def test_each_loss_is_compared_at_the_one_temperature_that_is_best_for_it():
    hot, cold = [value + 0.1 for value in KL], [value - 0.2 for value in KL]
    at = {"kl?temperature=4": KL, "kl?temperature=1": cold, "power?temperature=4": cold, "power?temperature=1": hot}
    results = [result("fonts", at), result("fonts", at | {"power?temperature=1": POWER}, teacher="misled-20")]
    lines = best_of_two(compared(results))
    assert {tuple(line["losses"]) for line in lines} == {("power?temperature=1", "kl?temperature=4")}
    misled = row_of(lines, teacher="misled-20")
    assert misled["p"] == pytest.approx(ttest_rel(POWER, KL).pvalue)
    assert misled["difference"] == pytest.approx(np.mean(POWER) - np.mean(KL))
    assert best_of_two(compared(results[:0])) == []


def test_two_losses_at_the_same_temperature_are_compared_with_scipys_p_value():
    losses = {"kl?temperature=1": KL, "power?temperature=1": POWER, "power?lam=1&temperature=1": LITERAL, BASE: KL}
    rows = compared([result("fonts", losses), result("digits", {**losses, "power?temperature=4": LITERAL})])
    lines = at_same_temperature(rows)
    assert [(line["task"], *line["losses"]) for line in lines] == [
        ("digits", "power?temperature=1", "kl?temperature=1"),
        ("digits", "power?temperature=4", "kl?temperature=4"),
        ("fonts", "power?temperature=1", "kl?temperature=1"),
    ]
    assert lines[0]["p"] == pytest.approx(ttest_rel(POWER, KL).pvalue)
    assert lines[0]["p_holm"] == pytest.approx(min(1, 3 * ttest_rel(POWER, KL).pvalue))
    assert lines[1]["difference"] == pytest.approx(np.mean(LITERAL) - np.mean(KL))


def test_every_cell_is_a_valid_loss_and_no_student_is_trained_twice():
    students, losses = set(), set()
    for cell in cells(list(TASKS)):
        for loss in cell.losses:
            losses.add(loss)
            for seed in cell.seeds if cell.axis != AUDIT else ():
                assert (cell.setting, loss, seed) not in students
                students.add((cell.setting, loss, seed))
    for loss in losses - {"features"}:
        assert Objective(split_terms(loss)).needs.outputs
    names = [cell.name for cell in cells(list(TASKS))]
    assert len(set(names)) == len(names)
    assert kd("power?lam=0.5", 4, weight=1.8, ce=0.1) == "power?lam=0.5&temperature=4&weight=1.8+ce?weight=0.1"


def test_wrong_labels_are_as_many_as_asked_and_always_the_same():
    source = open_source("synthetic?classes=10&n=1000&size=16")
    noisy = NoisyLabels(source, classes=10, share=0.4)
    labels = [noisy.sample(i).label for i in range(1000)]
    wrong = np.mean([label != i % 10 for i, label in enumerate(labels)])
    assert wrong == pytest.approx(0.4, abs=0.05)
    assert labels == [noisy.sample(i).label for i in range(1000)]
    assert set(labels) == set(range(10))


def test_characters_of_validation_are_in_other_fonts_and_are_drawn_alike_twice():
    first, again = ([np.asarray(image) for _, image in draw_fonts("val", 1)] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.tobytes() for image in first}) == 40
    for name in UNSEEN_FONTS:  # these fonts have the characters where others have them
        images = [np.asarray(glyph_in_font(name, character, np.random.default_rng(0))) for character in "AaRr8"]
        assert len({image.tobytes() for image in images}) == 5


def test_the_gradient_audit_measures_the_gradient_of_each_row():
    generator = torch.Generator().manual_seed(0)
    logits, target = (torch.randn(6, 10, generator=generator) * 4 for _ in range(2))
    kl, power = make_loss("kl?temperature=1")[1], make_loss("power?temperature=1")[1]
    expected = logits.softmax(1) - target.softmax(1)  # KL's gradient at T = 1
    assert torch.allclose(row_gradients(kl, logits, target), expected, atol=1e-6)
    same = comparison(kl, kl, logits, target)
    assert (same["shrunk"], same["norm"]) == (0.0, same["kl_norm"])
    assert same["cosine"] == pytest.approx(1)
    target[0] = torch.eye(10)[logits[0].argmin()] * 40  # confidently wrong where the student is sure
    logits[0] *= 5
    assert comparison(power, kl, logits, target)["shrunk"] >= 1 / 6


@pytest.mark.slow
def test_plots_are_the_same_bytes_from_the_same_results(tmp_path: Path):
    losses = {f"{name}?temperature={t}": KL for name in ("kl", "power") for t in (1, 2, 4, 8)} | {"ce": KL}
    rows = compared(
        [result("fonts", losses), result("fonts", losses, views=1), result("fonts", losses, teacher="misled-20")]
    )
    audited = [
        {"task": "fonts", "teacher": "sound", "loss": loss, "epoch": e, "norm": 1.0, "shrunk": 0.1, "cosine": 0.9}
        for loss in losses
        for e in (0, 1)
    ]
    for folder in ("a", "b"):
        draw(rows, audited, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["study_gradients.svg", "study_noise.svg", "study_temperature.svg", "study_views.svg"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@pytest.mark.slow
def test_a_repeated_cell_gives_the_same_numbers_bit_for_bit(tmp_path: Path):
    losses = ("ce", BASE, "power?calibrate=1")
    cell = Cell("test", Setting("glyphs10", "misled-20", per_class=5, views=2), losses, SEEDS[:2])
    first, again = (Study(Lab(tmp_path / folder, scale=1 / 96)) for folder in ("a", "b"))
    one, two = first.run(cell), again.run(cell)
    assert one["students"] == two["students"]
    assert len({student["nll"] for student in one["students"]}) == 6
    for folder in ("a", "b"):
        assert len(list((tmp_path / folder / "runs" / cell.name).glob("*/student.safetensors"))) == 6
    weights = [sorted((tmp_path / folder / "runs").rglob("student.safetensors")) for folder in ("a", "b")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    # Trained alone, a student is the same; and the second call reads the result.
    alone = first.run(dataclasses.replace(cell, losses=(BASE,), seeds=SEEDS[1:2]))
    (student,) = [s for s in one["students"] if (s["loss"], s["seed"]) == (BASE, 1)]
    assert alone["students"] == [student]
    assert first.run(cell) == json.loads(first.result(cell).read_text())


@pytest.mark.slow
def test_a_killed_study_leaves_no_worker_and_goes_on_where_it_was(tmp_path: Path):
    script, work = Path(sys.modules["study"].__file__), tmp_path / "work"
    command = [sys.executable, script, "--quick", "--tasks", "glyphs10", "--axes", "length", "--work", work]
    command += ["--json", tmp_path / "study.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    results = work / "results"
    deadline = time.monotonic() + 250
    while not (results.is_dir() and list(results.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.2)
    first = {path.name: path.read_bytes() for path in results.glob("*.json")}
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert workers
    assert not alive
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=250)
    saved = {path.name: path.read_bytes() for path in results.glob("*.json")}
    assert len(saved) == 2
    assert first.items() <= saved.items()
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert {row["length"] for row in rows if "length" in row} == {0.5, 2.0}
