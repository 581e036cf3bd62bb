"""Objectives: built from spec strings, weights, schedules, mixed labels, state, refusals."""

import pytest
import torch
from redistill_cache.codecs.floats import Float16Codec
from redistill_cache.codecs.topk import TopKCodec
from redistill_cache.errors import Refused, SpecMismatch, UsageError
from torch.nn import functional as F

from redistill.losses import (
    CATALOGUE,
    Mix,
    Objective,
    Schedule,
    TrainingProgress,
    Widths,
    dkd,
    kd,
    power_divergence,
    standardize,
)

ON_LOGITS = sorted(name for name, entry in CATALOGUE.items() if not entry.on_features)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 10, generator=generator)
    teacher = 3 * torch.randn(6, 10, generator=generator)
    labels = torch.randint(0, 10, (6,), generator=generator)
    labels[:2] = teacher[:2].argmax(1)  # the teacher is right on some rows, wrong on others
    return student.requires_grad_(), teacher, labels


def test_a_single_term_takes_the_published_weights(batch):
    student, teacher, labels = batch
    total, values = Objective(["power?lam=0.5&temperature=2"])(student, teacher, labels)
    ce, power = F.cross_entropy(student, labels), power_divergence(student, teacher, 0.5, 2.0)
    torch.testing.assert_close(total, 0.1 * ce + 0.9 * power)
    assert set(values) == {"ce", "power"}
    torch.testing.assert_close(values["power"], power.detach())
    torch.testing.assert_close(values["ce"], ce.detach())
    assert not any(value.requires_grad for value in values.values())


def test_cross_entropy_alone_needs_no_teacher(batch):
    student, _, labels = batch
    objective = Objective(["ce?smoothing=0.1"])
    total, values = objective(student, None, labels)
    torch.testing.assert_close(total, F.cross_entropy(student, labels, label_smoothing=0.1))
    assert set(values) == {"ce"}
    assert not objective.needs.teacher
    torch.testing.assert_close(Objective([])(student, None, labels)[0], F.cross_entropy(student, labels))


def test_distillation_alone_needs_no_labels(batch):
    student, teacher, _ = batch
    objective = Objective(["ce?weight=0", "kd?weight=1"])
    assert not objective.needs.labels
    total, values = objective(student, teacher, None)
    torch.testing.assert_close(total, kd(student, teacher))
    assert set(values) == {"kd"}


def test_several_terms_with_weights_names_and_standardisation(batch):
    student, teacher, labels = batch
    specs = ["ce?weight=0.5", "kd?weight=2", "kd?weight=3&temperature=2&standardize=1", "dkd?label=target&warmup=0"]
    total, values = Objective(specs)(student, teacher, labels)
    parts = {
        "ce": F.cross_entropy(student, labels),
        "kd": kd(student, teacher),
        "kd-2": kd(standardize(student), standardize(teacher), temperature=2.0),
        "target": dkd(student, teacher, labels=labels),
    }
    weights = {"ce": 0.5, "kd": 2.0, "kd-2": 3.0, "target": 1.0}
    torch.testing.assert_close(total, sum(weights[name] * parts[name] for name in parts))
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {name: part.item() for name, part in parts.items()}
    )


def test_hyphens_and_underscores_name_the_same_loss(batch):
    student, teacher, labels = batch
    for name in ("reverse-kl", "reverse_kl"):
        assert "reverse_kl" in Objective([name])(student, teacher, labels)[1]


def test_warmup_and_decay_scale_the_weight_and_not_the_logged_value(batch):
    student, teacher, _ = batch
    objective = Objective(["ce?weight=0", "kd?weight=2&warmup=4&decay=linear&decay_from=8"])
    whole = kd(student, teacher).item()
    for epoch, factor in ((0.0, 0.0), (1.0, 0.25), (4.0, 1.0), (8.0, 1.0), (9.0, 0.5), (10.0, 0.0), (11.0, 0.0)):
        total, values = objective(student, teacher, None, progress=TrainingProgress(epoch, 10))
        assert total.item() == pytest.approx(2 * factor * whole)
        assert values["kd"].item() == pytest.approx(whole)


def test_schedules_by_hand():
    cosine = Schedule(decay="cosine", floor=0.2)
    assert [cosine.factor(TrainingProgress(epoch, 10)) for epoch in (0, 5, 10)] == pytest.approx([1.0, 0.6, 0.2])
    assert Schedule(warmup=20).factor(TrainingProgress(5, 240)) == 0.25
    assert Schedule(decay="linear", decay_from=10).factor(TrainingProgress(12, 10)) == 0.0
    assert TrainingProgress(3, 0).fraction == 1.0
    assert TrainingProgress(5, 20).fraction == 0.25


def test_published_warmup_applies_and_can_be_turned_off(batch):
    student, teacher, labels = batch
    start = TrainingProgress(0.0, 240.0)
    ce = F.cross_entropy(student, labels)
    assert Objective(["dkd"])(student, teacher, labels, progress=start)[0].item() == pytest.approx(ce.item())
    total = Objective(["dkd?warmup=0"])(student, teacher, labels, progress=start)[0]
    assert total.item() == pytest.approx((ce + dkd(student, teacher, labels=labels)).item())


def test_mixed_views_mix_the_labels_row_by_row(batch):
    student, teacher, labels = batch
    partner, weights = labels.flip(0), torch.tensor([1.0, 0.0, 0.25, 0.5, 0.75, 0.9])
    _, values = Objective(["ce", "dkd", "kd"])(student, teacher, labels, mix=Mix(partner, weights))

    def mixed(rows_of):
        return (weights * rows_of(labels) + (1 - weights) * rows_of(partner)).mean().detach()

    torch.testing.assert_close(values["ce"], mixed(lambda y: F.cross_entropy(student, y, reduction="none")))
    torch.testing.assert_close(values["dkd"], mixed(lambda y: dkd(student, teacher, labels=y, reduction="none")))
    torch.testing.assert_close(values["kd"], kd(student, teacher).detach())  # the teacher saw the mixed view


def test_mixed_labels_are_those_of_soft_targets(batch):
    student, _, labels = batch
    weights = torch.full((6,), 0.3)
    total, _ = Objective([])(student, None, labels, mix=Mix(labels.roll(1), weights))
    target = 0.3 * F.one_hot(labels, 10) + 0.7 * F.one_hot(labels.roll(1), 10)
    torch.testing.assert_close(total, F.cross_entropy(student, target))


def test_a_loss_without_row_values_refuses_mixed_views(batch):
    student, teacher, labels = batch
    with pytest.raises(Refused, match="'topkd' needs one label per row"):
        Objective(["topkd"])(student, teacher, labels, mix=Mix(labels, torch.ones(6)))


def test_the_share_of_capped_rows_is_logged_for_members_with_a_cap(batch):
    student, teacher, labels = batch
    spec = "power?form=cressie-read&temperature=1&cap=0.5"
    values = Objective([spec])(student, 3 * teacher, labels)[1]
    assert 0.5 < values["power/capped"].item() <= 1.0
    assert "power/capped" not in Objective(["power"])(student, teacher, labels)[1]


@pytest.mark.parametrize("name", ON_LOGITS)
def test_every_loss_of_the_catalogue_runs_from_its_name(name, batch):
    student, teacher, labels = batch
    objective = Objective([name])
    total, values = objective(student, teacher, labels, progress=TrainingProgress(30, 240))
    total.backward()
    assert total.dtype == torch.float32
    assert total.shape == ()
    assert name in values
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


# Options without an effect on one first step on this batch: they act later, on a cap, or on a converged plan.
NO_EFFECT_YET = {("power", "cap"), ("ctkd", "ramp"), ("taid", "end"), ("taid", "momentum"), ("taid", "rate")}
NO_EFFECT_YET |= {("sinkhorn", "rounds")}


def another(value):
    """Another allowed value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value - 1 if value > 1 else value + 1
    return 0.5 * value + 0.3


@pytest.mark.parametrize("name", ON_LOGITS)
def test_every_option_of_a_loss_reaches_it(name, batch):
    student, teacher, labels = batch
    options = CATALOGUE[name].options
    base = f"{name}?warmup=0" + ("&temperature=3" if "temperature" in options else "")

    def value(spec):
        return Objective([spec, "ce?weight=0"])(student, teacher, labels)[0].item()

    for key, default in options.items():
        if not isinstance(default, str) and key != "temperature" and (name, key) not in NO_EFFECT_YET:
            assert value(f"{base}&{key}={another(default)}") != value(base), key
    if "temperature" in options:
        assert value(f"{name}?warmup=0&temperature=5") != value(base)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["powr"], "unknown loss 'powr'; did you mean power"),
        (["power?lamda=1"], "unknown option 'lamda'; did you mean lam"),
        (["power?lam=two"], "option lam must be a number, found 'two'"),
        (["power?form=bounde"], "did you mean bounded"),
        (["power?temperature=0"], "temperature must be a finite number above 0"),
        (["power:x"], "a loss has options but no name"),
        (["kd?weight=-1"], "weight must be a finite number, 0 or above"),
        (["kd?weight=nan"], "weight must be a finite number, 0 or above"),
        (["kd?decay=cosin"], "'kd.decay=cosin': unknown decay 'cosin'; did you mean cosine"),
        (["kd?warmup=-2"], "expected warmup >= 0"),
        (["taid?start=2"], "'taid.start=2': start must be in 0..1"),
        (["ce", "ce"], "'ce' is specified 2 times"),
        (["ce?weights=1"], "did you mean weight"),
        (["ce?smoothing=1"], "smoothing must be at least 0 and below 1"),
        (["ce?weight=0"], "nothing to minimise"),
        (["kd", "dkd"], "published with different cross-entropy weights"),
    ],
)
def test_invalid_specs_are_refused_in_one_line(specs, message):
    with pytest.raises(UsageError, match=message) as caught:
        Objective(specs)
    assert "\n" not in str(caught.value)


def test_a_term_without_a_teacher_or_labels_is_refused(batch):
    student, teacher, labels = batch
    with pytest.raises(UsageError, match="'kd' needs teacher logits"):
        Objective(["kd"])(student, None, labels)
    with pytest.raises(UsageError, match="needs labels"):
        Objective(["kd"])(student, teacher, None)
    with pytest.raises(Refused, match=r"labels must be in 0..9"):
        Objective(["kd"])(student, teacher, labels + 10)
    with pytest.raises(UsageError, match="student logits must be"):
        Objective([])(student[0], None, labels[:1])


def test_a_top_k_archive_is_refused_by_losses_that_need_whole_rows():
    top_k, whole = TopKCodec(10, 3), Float16Codec(10)
    Objective(["kd"]).refuse_codec(top_k)
    Objective(["dkd"]).refuse_codec(whole)
    with pytest.raises(Refused, match="'dkd' needs whole teacher rows"):
        Objective(["ce", "kd", "dkd"]).refuse_codec(top_k)


def test_needs_are_those_of_the_terms():
    for specs, teacher, labels in (
        (["ce"], False, True),
        (["taid"], True, False),
        (["taid", "ce?weight=1"], True, True),
        (["ce?weight=0", "ctkd", "dist"], True, False),
        (["ce?weight=0", "dist", "dkd"], True, True),
    ):
        needs = Objective(specs).needs
        assert (needs.teacher, needs.labels) == (teacher, labels)


def test_terms_with_parameters_or_state_are_submodules():
    objective = Objective(["ctkd", "taid", "dist", "ce?weight=1"])
    assert [name for name, _ in objective.named_parameters()] == ["terms.0.loss.theta"]
    assert [name for name, _ in objective.named_buffers()] == [
        f"terms.1.loss.{x}" for x in ("mix", "trend", "previous")
    ]


def test_a_resumed_objective_continues_exactly(batch):
    student, teacher, labels = batch
    specs = ["taid", "ctkd", "ce?weight=1"]

    def run(objective, epochs):
        optimiser = torch.optim.SGD(objective.parameters(), lr=0.5)
        trace = []
        for epoch in epochs:
            optimiser.zero_grad()
            total, _ = objective(student * (1 + epoch / 5), teacher, labels, progress=TrainingProgress(epoch, 10))
            total.backward()
            optimiser.step()
            trace.append(total.item())
        return trace

    whole = run(Objective(specs), range(8))
    first, second = Objective(specs), Objective(specs)
    started = run(first, range(4))
    second.load_state_dict(first.state_dict())
    assert started + run(second, range(4, 8)) == whole
    assert run(Objective(specs), range(4, 8)) != whole[4:]


def test_state_of_another_objective_is_refused():
    state = Objective(["taid"]).state_dict()
    with pytest.raises(SpecMismatch, match=r"belongs to the losses taid, this run has taid\?start"):
        Objective(["taid?start=0.5"]).load_state_dict(state)


def test_state_survives_a_safe_load(tmp_path):
    objective = Objective(["taid"])
    torch.save(objective.state_dict(), tmp_path / "state.pt")
    objective.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_under_autocast_everything_is_float32(batch):
    student, teacher, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = Objective(["power", "dist", "ce"])(student.bfloat16(), teacher, labels)
    assert total.dtype == torch.float32


def test_repr_shows_weights_and_specs():
    assert "0.1 ce + 0.9 power?lam=0.5" in repr(Objective(["power?lam=0.5"]))


def rank(number, directory):
    """One of two ranks: its own rows, a common state. Saves its state after two steps."""
    store = torch.distributed.FileStore(f"{directory}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    torch.manual_seed(number)
    objective = Objective(["taid", "ctkd", "ce?weight=1"])
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.5)
    for epoch in (3.0, 4.0):
        optimiser.zero_grad()
        student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
        objective(student, teacher, torch.arange(4), progress=TrainingProgress(epoch, 10))[0].backward()
        objective.synchronise()
        optimiser.step()
    torch.save(objective.state_dict(), f"{directory}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # starts two processes, each of which imports torch
def test_state_of_terms_is_the_same_on_every_rank(tmp_path):
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    assert {key for key in first if key != "_extra_state"} == {key for key in second if key != "_extra_state"}
    assert all(torch.equal(first[key], second[key]) for key in first if key != "_extra_state")


# -- features and the head --------------------------------------------------------------------------------------------


WIDTHS = Widths({"layer1": 4, "penultimate": 6}, {"layer1": 5, "penultimate": 7}, 10)


def feature_batch():
    generator = torch.Generator().manual_seed(3)
    student = {
        "logits": torch.randn(6, 10, generator=generator),
        "head_logits": torch.randn(6, 10, generator=generator),
    }
    student |= {name: torch.randn(6, width, generator=generator) for name, width in WIDTHS.student.items()}
    teacher = {name: torch.randn(6, width, generator=generator) for name, width in WIDTHS.teacher.items()}
    return student, teacher, torch.randint(0, 10, (6,), generator=generator)


def test_features_are_matched_for_every_pair_and_averaged():
    objective = Objective(
        ["features?pairs=layer1:layer1,penultimate:penultimate&weight=3", "ce?weight=2&on=head"], WIDTHS
    )
    student, teacher, labels = feature_batch()
    total, values = objective(student, teacher, labels)
    errors = []
    for name, loss in zip(("layer1", "penultimate"), objective.terms[0].losses, strict=True):
        difference = student[name].double() @ loss.projector.weight.detach().double().T - teacher[name].double()
        errors.append(difference.square().mean())
    torch.testing.assert_close(values["features"].double(), torch.stack(errors).mean(), atol=1e-6, rtol=1e-6)
    ce = F.cross_entropy(student["head_logits"], labels)
    torch.testing.assert_close(total, 3 * values["features"] + 2 * ce)


def test_features_alone_are_published_with_a_cross_entropy_of_the_last_layer():
    short, written = Objective(["features"]), Objective(["features?weight=1", "ce?weight=1&on=head"])
    assert short.needs == written.needs
    assert (short.ce_weight, short.ce_on) == (written.ce_weight, written.ce_on) == (1.0, "head")
    assert short.needs.open_pairs
    assert short.needs.teacher
    assert short.needs.sources == ()


def test_what_a_loss_on_features_needs():
    pairs = "pairs=layer1:layer2,penultimate:penultimate"
    needs = Objective([f"features?{pairs}", "kl", "ce?weight=1"]).needs
    assert needs.sources == ((None, "layer2"), (None, "penultimate"), (None, "logits"))
    assert needs.layers == ("layer1", "penultimate")
    assert needs.outputs == ("logits",)
    named = Objective(["features?pairs=a:b&teacher=big", "ce?weight=0"]).needs
    assert named.sources == (("big", "b"),)
    assert (named.labels, named.outputs) == (False, ())
    assert Objective(["exit?layer=a,b"]).needs.layers == ("a", "b")
    assert Objective(["dkd?on=head", "ce"]).needs.outputs == ("head_logits", "logits")


def test_a_logit_loss_on_the_head_sees_its_logits():
    student, teacher, labels = feature_batch()
    teacher["logits"] = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))
    total, _ = Objective(["kd?on=head&weight=1", "ce?weight=0"])(student, teacher, labels)
    torch.testing.assert_close(total, kd(student["head_logits"], teacher["logits"]))


def test_features_that_are_missing_are_named():
    student, teacher, labels = feature_batch()
    with pytest.raises(UsageError, match="'features' needs teacher penultimate, found logits"):
        Objective(["features?pairs=penultimate:penultimate"], WIDTHS)(student, teacher["layer1"], labels)
    with pytest.raises(UsageError, match="'features' needs pairs of layers and their widths"):
        Objective(["features"])(student, teacher, labels)
