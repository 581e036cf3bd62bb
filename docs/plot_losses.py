"""Write the plots of docs/LOSSES.md and print the numbers of its tables.

python docs/plot_losses.py
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from redistill.losses import power_divergence

PLOTS = Path(__file__).parent / "plots"

# label, lam, form, order, colour, line
MEMBERS = (
    ("bounded 2/3 (default)", 2 / 3, "bounded", "teacher-first", "tab:green", "-"),
    ("bounded 1/2 (Hellinger)", 1 / 2, "bounded", "teacher-first", "tab:olive", "-"),
    ("KL (lam = 0)", 0.0, "bounded", "teacher-first", "black", "-"),
    ("reverse KL (bounded 1)", 1.0, "bounded", "teacher-first", "tab:gray", "--"),
    ("cressie-read 2/3", 2 / 3, "cressie-read", "teacher-first", "tab:red", "-"),
    ("cressie-read 2/3, student first", 2 / 3, "cressie-read", "student-first", "tab:orange", "--"),
)


def rows(student: Tensor, teacher: Tensor, member: tuple, temperature: float = 1.0) -> Tensor:
    """Per-row values between rows of probabilities, without the cap."""
    _, lam, form, order, _, _ = member
    return power_divergence(student.log(), teacher.log(), lam, temperature, form, order, reduction="none", cap=math.inf)


def wrong_row(classes: int = 100) -> tuple[Tensor, Tensor]:
    """A student with probability 0.9 for class 0, and a teacher with 0.95 for class 1."""
    student = torch.full((1, classes), 0.1 / (classes - 1), dtype=torch.float64)
    teacher = torch.full((1, classes), 0.04 / (classes - 2), dtype=torch.float64)
    student[0, 0], teacher[0, 0], teacher[0, 1] = 0.9, 0.01, 0.95
    return student, teacher


def gradient(member: tuple, temperature: float) -> Tensor:
    """The gradient with respect to the student's logits on the confidently wrong row."""
    student, teacher = wrong_row()
    logits = student.log().requires_grad_()
    _, lam, form, order, _, _ = member
    loss = power_divergence(logits, teacher.log(), lam, temperature, form, order, cap=math.inf)
    return torch.autograd.grad(loss, logits)[0][0]


def minimum(member: tuple, share: float, classes: int = 100) -> float:
    """The true class's probability for the best single prediction for all rows, `share` of which are wrong."""
    teacher = torch.full((classes, classes), 0.1 / (classes - 1), dtype=torch.float64)
    teacher.fill_diagonal_(0.9)
    # Row 0 is right; the other rows, one for each wrong class, have the weight `share` together.
    weights = torch.full((classes,), share / (classes - 1), dtype=torch.float64)
    weights[0] = 1 - share
    # Start at the minimum of KL: bounded members are flat far from theirs, and the line search would fail.
    logits = (weights @ teacher).log()[None].requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimiser.zero_grad()
        student = logits.softmax(1).expand_as(teacher)
        loss = (weights * rows(student, teacher, member)).sum()
        loss.backward()
        return loss

    optimiser.step(step)
    return logits.detach().softmax(1)[0, 0].item()


def plot_values() -> None:
    figure, axes = plt.subplots(figsize=(6.2, 3.6))
    q = torch.linspace(0.004, 0.996, 160, dtype=torch.float64)
    student = torch.stack([q, 1 - q], 1)
    teacher = torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64).expand(160, 2)
    for member in MEMBERS:
        axes.plot(q, rows(student, teacher, member), label=member[0], color=member[4], linestyle=member[5])
    axes.set(xlabel="student's q, teacher (1/3, 2/3)", ylabel="value at T = 1", ylim=(0, 2.6), xlim=(0, 1))
    finish(figure, axes, "power_value.svg")


def plot_gradients() -> None:
    figure, axes = plt.subplots(figsize=(6.2, 3.6))
    temperatures = torch.logspace(0, math.log10(16), 25, dtype=torch.float64).tolist()
    for member in MEMBERS:
        sizes = [gradient(member, temperature).abs().sum().item() for temperature in temperatures]
        axes.plot(temperatures, sizes, label=member[0], color=member[4], linestyle=member[5])
    axes.set(xscale="log", yscale="log", xlabel="temperature", ylabel="|gradient| (L1), times T²")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    finish(figure, axes, "power_gradient.svg")


def plot_minima() -> None:
    figure, axes = plt.subplots(figsize=(6.2, 3.6))
    shares = [0.01, *(0.05 * i for i in range(1, 11))]
    for member in MEMBERS:
        axes.plot(
            shares, [minimum(member, share) for share in shares], label=member[0], color=member[4], linestyle=member[5]
        )
    axes.set(
        xlabel="share of confidently wrong teacher rows", ylabel="student's probability of the true class", ylim=(0, 1)
    )
    finish(figure, axes, "power_minimum.svg")


def finish(figure: plt.Figure, axes: plt.Axes, name: str) -> None:
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / name, metadata={"Date": None})
    plt.close(figure)


def print_tables() -> None:
    print("gradient (times T²) on the confidently wrong row: true class / wrong class / L1")
    for member in MEMBERS:
        for temperature in (1.0, 4.0):
            row = gradient(member, temperature)
            true, wrong, size = row[0].item(), row[1].item(), row.abs().sum().item()
            print(f"  {member[0]:32} T={temperature:g}  {true:8.3f} {wrong:8.3f} {size:8.3f}")
    print("probability of the true class where a share of the rows is wrong: 10 %, 20 %, 40 %")
    for member in MEMBERS:
        print(f"  {member[0]:32} " + "  ".join(f"{minimum(member, share):.2f}" for share in (0.1, 0.2, 0.4)))


if __name__ == "__main__":
    # Text as text and fixed ids, so that a second run writes the same bytes.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "redistill", "path.simplify_threshold": 0.5})
    plot_values()
    plot_gradients()
    plot_minima()
    print_tables()
