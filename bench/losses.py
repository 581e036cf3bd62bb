"""Time and memory of the power divergence relative to standard distillation (kl_div and two softmaxes).

    python bench/losses.py [--quick] [--json PATH]

One step is forward and backward of the loss alone, from float32 logits to the gradient of the student's, in one thread.
The two losses alternate, so that other load on the machine affects both; `ratio` is the ratio of the median times, and
`memory` that of the peak allocations of a step, without its inputs.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Otherwise the memory profiler logs two lines for each measurement.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

from redistill.losses import power_divergence

Loss = Callable[[Tensor, Tensor], Tensor]

TEMPERATURE = 4.0
GOALS = {"eager": 1.2, "compiled": 1.0}


def standard_kd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, p = F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def bounded(student: Tensor, teacher: Tensor) -> Tensor:
    return power_divergence(student, teacher)


def literal(student: Tensor, teacher: Tensor) -> Tensor:
    return power_divergence(student, teacher, form="cressie-read")


def as_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return power_divergence(student, teacher, lam=0.0)


MEMBERS: dict[str, Loss] = {"power": bounded, "power?form=cressie-read": literal, "power?lam=0": as_kl}


def step(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    loss(student, teacher).backward()
    student.grad = None


def seconds(losses: list[Loss], student: Tensor, teacher: Tensor, repeats: int) -> list[float]:
    """Median seconds of a step of each loss, measured alternately."""
    times: list[list[float]] = [[] for _ in losses]
    for turn in range(-3, repeats):
        for loss, durations in zip(losses, times, strict=True):
            _finish(student)
            start = time.perf_counter()
            step(loss, student, teacher)
            _finish(student)
            if turn >= 0:
                durations.append(time.perf_counter() - start)
    return [statistics.median(durations) for durations in times]


def peak_bytes(loss: Loss, student: Tensor, teacher: Tensor) -> int:
    """The peak of the memory that a step allocates."""
    step(loss, student, teacher)
    if student.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, student, teacher)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(loss, student, teacher)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def measure(name: str, mode: str, classes: int, device: str, repeats: int) -> harness.Row:
    rows = max(16, min(256, 2**21 // classes))
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(rows, classes, generator=generator)).to(device).requires_grad_()
    teacher = (5 * torch.randn(rows, classes, generator=generator)).to(device)
    losses = [MEMBERS[name], standard_kd]
    if mode == "compiled":
        torch.compiler.reset()
        losses = [torch.compile(loss, fullgraph=True) for loss in losses]
    ours, theirs = seconds(losses, student, teacher, repeats)
    memory = peak_bytes(losses[0], student, teacher) / peak_bytes(losses[1], student, teacher)
    goal = GOALS[mode] if name == "power" else None
    return {
        "name": f"{name} {mode} {device} C={classes}",
        "batch": rows,
        "kd_ms": 1e3 * theirs,
        "power_ms": 1e3 * ours,
        "ratio": ours / theirs,
        "goal": goal,
        "memory": memory,
        "memory_goal": 1.0 if goal else None,
        "met": None if goal is None else ours / theirs <= goal and memory <= 1.0,
    }


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    sizes, repeats = ((100, 1000), 40) if args.quick else ((100, 1000, 21_843), 300)
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for classes in sizes:
            count = max(20, repeats * 100 // classes) if classes > 1000 else repeats
            rows += [measure(name, "eager", classes, device, count) for name in MEMBERS]
            rows.append(measure("power", "compiled", classes, device, count))
    harness.report("losses", rows, args)


if __name__ == "__main__":
    main()
