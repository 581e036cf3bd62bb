"""One student: its network, what it minimises, and everything that must be saved of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from redistill_cache.errors import Refused
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from redistill.devices import refuse_out_of_memory
from redistill.losses.objective import Mix, Objective
from redistill.losses.schedule import TrainingProgress
from redistill.models import OpenedModel
from redistill.optim import clip_gradients, lr_at, make_optimizer, set_lr
from redistill.ranks import World
from redistill.training.options import MemberSpec, TrainOptions

__all__ = ["Member"]


class Member:
    """A student in training.

    Members share the views and the teacher's answers of a step and nothing else: each has its own random numbers, so
    that it comes out as it would have alone.
    """

    def __init__(self, spec: MemberSpec, options: TrainOptions, opened: OpenedModel, world: World, amp: Any) -> None:  # noqa: ANN401  torch.dtype or None
        self.spec, self.options, self.opened, self.world, self.amp = spec, options, opened, world, amp
        self.optim = options.optim
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        with refuse_out_of_memory(options.batch_size, world.device):
            self.module = opened.module.to(world.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.normalise = opened.normalise().to(world.device)
        self.objective = Objective(spec.losses).to(world.device)
        self.optimizer = make_optimizer(nn.ModuleList([self.module, self.objective]), self.optim)
        self.average = (
            AveragedModel(self.module, multi_avg_fn=averaging(options.ema), use_buffers=True)
            if options.ema is not None
            else None
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=amp is torch.float16)
        self.trained = world.wrap(self.module, options.sync_bn)
        self.network: Any = torch.compile(self.trained) if options.compile else self.trained
        self.noise = first_noise(spec.seed, world.rank.rank, world.device)
        self.history: list[dict[str, Any]] = []
        self.best = -math.inf
        self.best_epoch = 0
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    # -- training -----------------------------------------------------------------------------------------------------

    def step(
        self,
        pixels: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        mix: Mix | None,
        progress: TrainingProgress,
        share: float,
    ) -> None:
        """One step on this process's part of a global batch; `share` is its rows over an equal part's."""
        lr = lr_at(self.optim, progress.epoch)
        set_lr(self.optimizer, lr)
        self.network.train()
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = even_parts(len(pixels), self.options.grad_accum)
        for at in parts:
            part, last = at.stop - at.start, at is parts[-1]
            with (
                self._without_sync(last),
                self._own_noise(),
                refuse_out_of_memory(part, self.world.device),
                refuse_too_few(part, self.spec.student),
            ):
                total, values = self._forward(
                    pixels[at],
                    None if teacher is None else teacher[at],
                    labels[at],
                    None if mix is None else Mix(mix.partner_labels[at], mix.weights[at]),
                    progress,
                )
                self.scaler.scale(total * (share * part / len(pixels))).backward()
            self._count(values | {"loss": total.detach()}, part)
        self.objective.synchronise()
        self.scaler.unscale_(self.optimizer)
        clip_gradients([p for group in self.optimizer.param_groups for p in group["params"]], self.optim)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.module)

    def _forward(
        self, pixels: Tensor, teacher: Tensor | None, labels: Tensor, mix: Mix | None, progress: TrainingProgress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.world.device.type, self.amp) if self.amp is not None else nullcontext():
            logits = self.network(self.normalise(pixels).contiguous(memory_format=self.memory_format))
        answer: tuple[Tensor, dict[str, Tensor]] = self.objective(logits, teacher, labels, progress=progress, mix=mix)
        return answer

    @contextmanager
    def _without_sync(self, last: bool) -> Iterator[None]:
        """Gradients of all but the last part stay here."""
        if last or not isinstance(self.trained, nn.parallel.DistributedDataParallel):
            yield
            return
        with self.trained.no_sync():
            yield

    @contextmanager
    def _own_noise(self) -> Iterator[None]:
        """Dropout and the like draw from this member's generators."""
        device = self.world.device
        before = torch.get_rng_state()
        torch.set_rng_state(self.noise["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.noise["cuda"], device)
        try:
            yield
        finally:
            self.noise["cpu"] = torch.get_rng_state()
            torch.set_rng_state(before)
            if device.type == "cuda":
                self.noise["cuda"] = torch.cuda.get_rng_state(device)

    def _count(self, values: Mapping[str, Tensor], rows: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.float() * rows
        self.rows += rows

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite, which every later one then would be."""
        return bool(self.rows) and not bool(self.sums["loss"].isfinite())

    @property
    def finite(self) -> bool:
        """Whether all its weights are, running statistics included."""
        return all(bool(tensor.isfinite().all()) for tensor in self.module.state_dict().values())

    def counted(self) -> tuple[dict[str, float], int]:
        """Sums of every part of the loss since the last `forget`, and over how many rows."""
        return {name: float(total) for name, total in self.sums.items()}, self.rows

    def add_counted(self, sums: Mapping[str, float], rows: int) -> None:
        for name, total in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.tensor(total, device=self.world.device)
        self.rows += rows

    def means(self) -> dict[str, float]:
        """Of every part of the loss since the last `forget`."""
        return {name: float(total) / self.rows for name, total in self.sums.items()} if self.rows else {}

    def forget(self) -> None:
        self.sums, self.rows = {}, 0

    # -- what is kept -------------------------------------------------------------------------------------------------

    @property
    def student(self) -> nn.Module:
        """The network that is validated and saved."""
        return self.module if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "noise": self.noise,
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "sums": self.sums,
            "rows": self.rows,
        }

    def load(self, state: Mapping[str, Any], place: tuple[int, int]) -> None:
        """Go on from a state; other ranks than the first have new noise, which is a function of the place."""
        self.module.load_state_dict(state["module"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        rank = self.world.rank.rank
        self.noise = first_noise(f"{self.spec.seed} {place}", rank, self.world.device) if rank else state["noise"]
        self.history = list(state["history"])
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        if self.world.first:
            self.sums = {name: total.to(self.world.device) for name, total in state["sums"].items()}
            self.rows = state["rows"]


def even_parts(count: int, parts: int) -> list[slice]:
    """`count` items in so many parts that differ by one at most; fewer where there are fewer items."""
    parts = min(parts, count)
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@contextmanager
def refuse_too_few(rows: int, student: str) -> Iterator[None]:
    """Batch norms of a network that ends in one pixel cannot be trained on one view at a time."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise Refused(
            f"the batch norms of {student!r} cannot be trained on {rows} views at a time; use a larger --batch-size or "
            "--size, or a smaller --grad-accum"
        ) from None


def averaging(decay: float) -> Any:  # noqa: ANN401  what AveragedModel takes
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]


def first_noise(seed: object, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Generator states that depend on the member and the rank alone."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:8], "little") >> 1
    states = {"cpu": torch.Generator().manual_seed(number).get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(number).get_state()
    return states
