"""The simulated device refuses and reports what a GPU would."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from tests.simulated_cuda import simulated_cuda
from tests.simulated_cuda.device import MixedDevices


def kinds(syncs) -> list[str]:
    return [sync.kind for sync in syncs]


def test_tensors_report_their_device_and_mixing_devices_is_an_error():
    with simulated_cuda(2):
        x, y = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        assert (x.device, x.is_cuda, y.device) == (torch.device("cuda:0"), True, torch.device("cuda:1"))
        assert (x * 2 + 1).new_zeros(2).device == x.device
        for other in (y, torch.ones(3)):
            with pytest.raises(MixedDevices):
                x + other
        assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2], "a number may be on the CPU"
        with pytest.raises(RuntimeError):
            x.numpy()
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "simulated GPU"


def test_a_thread_starts_on_the_first_device_and_sees_the_same_simulation():
    found = []
    with simulated_cuda(2):
        torch.cuda.set_device("cuda:1")
        thread = threading.Thread(target=lambda: found.append(torch.ones(1, device="cuda").device))
        thread.start()
        thread.join()
        found.append(torch.ones(1, device="cuda").device)
    assert found == [torch.device("cuda:0"), torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        (lambda x: x.sum().item(), ["item"]),
        (lambda x: bool((x > 0).all()), ["item"]),
        (lambda x: x.cpu(), ["copy to the host"]),
        (lambda x: x.nonzero(), ["nonzero"]),
        (lambda x: x[x > 0], ["nonzero of a mask"]),
        (lambda x: x[torch.tensor([0, 1])], ["copy of an index to the device"]),
        (lambda x: torch.ones(2).to(x.device), ["blocking copy to the device"]),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), ["blocking copy to the device"]),
        (
            lambda x: torch.ones(2).to(x.device, non_blocking=True),
            ["copy to the device from memory that is not pinned"],
        ),
        (lambda x: torch.ones(2).pin_memory()[1:].to(x.device, non_blocking=True), []),
        (lambda x: x.to("cpu", non_blocking=True), []),
        (lambda x: x.masked_fill_(x > 0, 2.0).relu().softmax(0).argmax(), []),
        (lambda x: torch.cuda.synchronize(), ["torch.cuda.synchronize"]),
    ],
)
def test_what_waits_for_the_device_is_counted(waits, expected):
    with simulated_cuda() as gpu:
        x = torch.rand(4, device="cuda:0")
        with gpu.counting() as syncs:
            waits(x)
    assert kinds(syncs) == expected


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_gives_the_numbers_of_the_cpu(kind, foreach: bool):
    def trained(device: str) -> list[torch.Tensor]:
        model = copy.deepcopy(network().to(device, memory_format=torch.channels_last))
        optimizer = kind(model.parameters(), lr=0.1, foreach=foreach)
        for step in range(3):
            pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)
            loss = nn.functional.cross_entropy(model(pixels), torch.arange(6).to(device) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [value.cpu() for value in model.state_dict().values()]

    with simulated_cuda():
        found = trained("cuda:0")
    for value, expected in zip(found, trained("cpu"), strict=True):
        torch.testing.assert_close(value, expected)


def test_autocast_lowers_products_and_raises_sums_with_gradients_in_float32():
    with simulated_cuda():
        model = network().to("cuda:0")
        pixels = torch.rand(6, 3, 8, 8, device="cuda:0")
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(pixels)
            with torch.autocast("cuda", enabled=False):
                exact = model(pixels)
            assert (logits.dtype, exact.dtype, logits.softmax(1).dtype) == (
                torch.bfloat16,
                torch.float32,
                torch.float32,
            )
        assert 0 < (logits - exact).abs().max().item() < 0.05
        logits.float().sum().backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_device_has_its_own_random_numbers():
    with simulated_cuda():
        host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
        first = torch.rand(3, device="cuda:0")
        assert torch.equal(torch.get_rng_state(), host)
        torch.cuda.set_rng_state(device)
        assert torch.equal(torch.rand(3, device="cuda:0").cpu(), first.cpu())
