"""Learning rate schedules, optimisers under timm's names, presets of the literature."""

from __future__ import annotations

import math

import pytest
import torch
from redistill_cache.errors import UsageError
from torch import nn

from redistill.models import demo
from redistill.optim import OptimConfig, clip_gradients, lr_at, make_optimizer, preset, set_lr


def test_cosine_against_torch():
    config = OptimConfig(lr=0.3, min_lr=0.01, epochs=20)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.01)
    for epoch in range(21):
        assert lr_at(config, epoch) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert lr_at(config, 25) == pytest.approx(0.01)  # constant after the last epoch


def test_onecycle_against_torch():
    """Torch counts steps, so its peak and its end are up to one step of an epoch's many earlier."""
    steps, epochs = 20_000, 10
    config = OptimConfig(lr=0.3, epochs=epochs, sched="onecycle")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, cycle_momentum=False)
    for step in range(steps - 1):
        if step % 100 == 0:
            assert lr_at(config, step / (steps - 1) * epochs) == pytest.approx(reference.get_last_lr()[0], abs=1e-4)
        optimizer.step()
        reference.step()
    assert lr_at(config, 0) == pytest.approx(0.3 / 25)
    assert lr_at(config, 3) == pytest.approx(0.3)
    assert lr_at(config, 10) == lr_at(config, 11) == pytest.approx(0.3 / 25e4)
    with pytest.raises(UsageError, match="onecycle warms up over 30 % of the epochs; leave out --warmup-epochs"):
        OptimConfig(sched="onecycle", warmup_epochs=1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OptimConfig(lr=1, sched="constant"), {0: 1, 7.5: 1, 240: 1}),
        (OptimConfig(lr=1, sched="step", decay_epochs=10), {0: 1, 9.99: 1, 10: 0.1, 29: 0.01}),
        (
            OptimConfig(lr=1, sched="multistep", decay_milestones=(3, 5)),
            {2.999: 1, 3: 0.1, 4.5: 0.1, 5: 0.01, 99: 0.01},
        ),
        (OptimConfig(lr=1, sched="step", decay_epochs=1, min_lr=0.05), {0: 1, 1: 0.1, 2: 0.05, 50: 0.05}),
        (
            OptimConfig(lr=1, warmup_epochs=4, warmup_lr=0.2, epochs=12),
            {0: 0.2, 1: 0.4, 3.5: 0.9, 4: 1, 8: 0.5, 12: 0},
        ),
        (OptimConfig(lr=1, warmup_epochs=2, sched="multistep", decay_milestones=(3,)), {1: 0.5, 2: 1, 3: 0.1}),
        (OptimConfig(lr=1, warmup_epochs=5, epochs=5), {2.5: 0.5, 5: 0}),
    ],
    ids=["constant", "step", "multistep", "floor", "warm cosine", "warm multistep", "all warm-up"],
)
def test_schedules(config: OptimConfig, expected: dict[float, float]):
    assert {p: lr_at(config, p) for p in expected} == pytest.approx(expected)


def test_the_preset_of_features_is_the_published_one():
    features = preset("features", model="resnet18")
    assert (features.batch_size, features.optim.epochs, features.optim.lr) == (128, 50, 0.0075)
    assert (features.optim.opt, features.optim.weight_decay, features.optim.sched) == ("adamw", 0.01, "onecycle")
    assert preset("features", model="vgg8").optim.lr == 0.005
    assert preset("features", model="vit_b_16", batch_size=256).optim.lr == 0.002


def test_milestones_fall_on_the_first_step_of_their_epoch():
    """steps / steps_per_epoch is exact at whole epochs, whatever the number of steps."""
    config = preset("cifar-kd").optim
    for steps_per_epoch in (1, 7, 390, 782, 99_991):
        first = 150 * steps_per_epoch
        assert lr_at(config, first / steps_per_epoch) == pytest.approx(0.005)
        assert lr_at(config, (first - 1) / steps_per_epoch) == pytest.approx(0.05)


def test_presets_match_the_papers():
    crd = preset("cifar-kd", model="resnet8x4")
    assert (crd.batch_size, crd.optim.opt, crd.optim.momentum, crd.optim.weight_decay) == (64, "sgd", 0.9, 5e-4)
    rates = [lr_at(crd.optim, epoch) for epoch in (0, 149, 150, 180, 210, 239)]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-4, 5e-5, 5e-5])
    for gentle in ("MobileNetV2", "ShuffleV1", "ShuffleV2"):
        assert preset("cifar-kd", model=gentle).optim.lr == pytest.approx(0.01)
    imagenet = preset("imagenet-100", batch_size=512).optim
    assert [lr_at(imagenet, e) for e in (0, 30, 60, 90)] == pytest.approx([0.2, 0.02, 0.002, 0.0002])
    assert imagenet.weight_decay == 1e-4
    with pytest.raises(UsageError, match="did you mean cifar-kd"):
        preset("cifar_kd")


@pytest.mark.parametrize("opt", ["sgd", "nesterov", "adam", "adamw"])
def test_every_optimiser_lowers_a_loss(opt: str):
    torch.manual_seed(0)
    network = demo.build("tiny", 3)
    config = OptimConfig(opt=opt, lr=0.01 if opt.startswith("adam") else 0.1, clip_grad=5.0)
    optimizer = make_optimizer(network, config)
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 3
    losses = []
    for step in range(15):
        set_lr(optimizer, lr_at(config, step / 15))
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = clip_gradients(network.parameters(), config)
        assert norm is not None
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_sgd_has_plain_momentum():
    assert make_optimizer(nn.Linear(2, 2), OptimConfig(opt="sgd")).defaults["nesterov"] is False
    assert make_optimizer(nn.Linear(2, 2), OptimConfig(opt="nesterov")).defaults["nesterov"] is True


def test_no_weight_decay_for_norms_and_biases():
    network = demo.build("large", 3)
    all_groups = make_optimizer(network, OptimConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in all_groups] == [0.1]
    decayed, exempt = make_optimizer(network, OptimConfig(weight_decay=0.1, no_decay_norm_bias=True)).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in exempt["params"]} == {1}
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(network.parameters()))


def test_frozen_parameters_are_left_out():
    network = demo.build("tiny", 3)
    network.get_submodule("layer1").requires_grad_(False)
    updated = {id(p) for group in make_optimizer(network, OptimConfig()).param_groups for p in group["params"]}
    assert updated == {id(p) for p in network.parameters() if p.requires_grad}


def test_clipping_scales_the_whole_gradient():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    for parameter, grad in zip(parameters, ([2.0, 3.0], [6.0]), strict=True):
        parameter.grad = torch.tensor(grad)
    assert clip_gradients(parameters, OptimConfig()) is None
    assert parameters[1].grad.item() == 6
    norm = clip_gradients(parameters, OptimConfig(clip_grad=3.5))
    assert norm is not None
    assert norm.item() == pytest.approx(7)
    assert parameters[0].grad.tolist() == pytest.approx([1.0, 1.5], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt": "adamW"}, "did you mean adam or adamw"),
        ({"sched": "cos"}, "--sched 'cos' is not known"),
        ({"lr": 0.0}, "--lr must be above 0 and below inf, found 0.0"),
        ({"lr": math.nan}, "--lr must be"),
        ({"lr": math.inf}, "--lr must be"),
        ({"weight_decay": -1e-4}, "--weight-decay must be"),
        ({"momentum": 1.0}, "--momentum must be"),
        ({"momentum": 0.0}, "needs --momentum above 0"),
        ({"epochs": 0}, "--epochs must be"),
        ({"epochs": 3, "warmup_epochs": 4}, "--warmup-epochs 4 is above --epochs 3"),
        ({"min_lr": 1.0}, "above --lr"),
        ({"sched": "multistep"}, "needs --decay-milestones"),
        ({"decay_milestones": (30, 20)}, "must increase"),
        ({"decay_milestones": (0, 20)}, "--decay-milestones must be above 0, found 0"),
        ({"clip_grad": 0.0}, "--clip-grad must be"),
        ({"decay_rate": 0.0}, "--decay-rate must be"),
    ],
)
def test_invalid_settings_are_refused(settings, message: str):
    with pytest.raises(UsageError, match=message) as refusal:
        OptimConfig(**settings)
    assert "\n" not in str(refusal.value)
