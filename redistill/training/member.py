"""One student in training: its network, objective, optimiser and random state, and how they are saved and restored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from redistill_cache.errors import Refused, SpecMismatch
from torch import Tensor, nn

from redistill.devices import refuse_out_of_memory
from redistill.losses.curriculum import TrainingProgress
from redistill.losses.objective import Mix, Needs, Objective
from redistill.models import OpenedModel
from redistill.optim import clip_gradients, lr_at, make_optimizer, set_lr
from redistill.ranks import World
from redistill.signals import HEAD_LOGITS, LOGITS, PENULTIMATE, Head, Taps
from redistill.training.average import AveragedWeights
from redistill.training.options import MemberSpec, TrainOptions

__all__ = ["Member"]


class Member:
    """A student of a cohort.

    Members share the pixels and the teacher's rows of a step and nothing else. Each has its own random state, so its
    weights are the same as if it were trained alone.
    """

    def __init__(
        self,
        spec: MemberSpec,
        options: TrainOptions,
        opened: OpenedModel,
        objective: Objective,
        world: World,
        amp: torch.dtype | None,
        *,
        head: str | None = None,
        teacher_head: Head | None = None,
    ) -> None:
        """`head` is the name of the last layer, for an objective that needs more of the network than its logits.

        With `teacher_head`, the last layer is this one of the teacher behind the projector of the objective, at every
        step, and is not trained.
        """
        self.spec, self.options, self.opened, self.world, self.amp = spec, options, opened, world, amp
        self.optim = options.optim
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        with refuse_out_of_memory(options.batch_size, world.device):
            self.module = opened.module.to(world.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.normalise = opened.normalise().to(world.device)
        self.objective = objective.to(world.device)
        self.head_name = head
        self.teacher_head = (
            None if teacher_head is None else Head(*(tensor.to(world.device) for tensor in teacher_head))
        )
        self._place_teacher_head()
        self.optimizer = make_optimizer(nn.ModuleList([self.module, self.objective]), self.optim)
        self.average = None if options.ema is None else AveragedWeights(self.module, options.ema)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=amp is torch.float16)
        if options.sync_bn:
            self.module = world.synchronise_norms(self.module)
        needs = objective.needs
        tapped = Taps(self.module, needs.layers, head, outputs=needs.outputs) if needs.taps else self.module
        self.wrapped = world.wrap(tapped, unused=needs.taps and not trains_all(needs, teacher_head))
        self.network: Any = compiled(self.wrapped, len(options.members)) if options.compile else self.wrapped
        self.rng_state = initial_rng_state(spec.seed, world.rank.rank, world.device)
        self.history: list[dict[str, Any]] = []
        self.best = -math.inf
        self.best_epoch = 0
        self.sums: dict[str, Tensor] = {}
        """Every part of the loss, summed over `rows` since the epoch began."""
        self.rows = 0

    # -- training -----------------------------------------------------------------------------------------------------

    def step(
        self,
        pixels: Tensor,
        teacher: Mapping[str, Tensor] | None,
        labels: Tensor,
        mix: Mix | None,
        progress: TrainingProgress,
        rank_weight: float,
    ) -> None:
        """One step on this rank's rows of a global batch; `rank_weight` is their number over the mean of all ranks."""
        set_lr(self.optimizer, lr_at(self.optim, progress.epoch))
        self.network.train()
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = even_parts(len(pixels), self.options.grad_accum)
        for part in parts:
            rows = part.stop - part.start
            with (
                self._sync_gradients(part is parts[-1]),
                self._own_rng_state(),
                refuse_out_of_memory(rows, self.world.device),
                refuse_too_few_rows(rows, self.spec.student),
            ):
                total, values = self._forward(
                    pixels[part],
                    None if teacher is None else {name: rows[part] for name, rows in teacher.items()},
                    labels[part],
                    None if mix is None else Mix(mix.partner_labels[part], mix.weights[part]),
                    progress,
                )
                self.scaler.scale(total * (rank_weight * rows / len(pixels))).backward()
            self._add_to_sums(values | {"loss": total.detach()}, rows)
        self.objective.synchronise()
        self.scaler.unscale_(self.optimizer)
        clip_gradients([p for group in self.optimizer.param_groups for p in group["params"]], self.optim)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._place_teacher_head()
        if self.average is not None:
            self.average.update(self.module)

    def _forward(
        self,
        pixels: Tensor,
        teacher: Mapping[str, Tensor] | None,
        labels: Tensor,
        mix: Mix | None,
        progress: TrainingProgress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.world.device.type, self.amp) if self.amp is not None else nullcontext():
            outputs = self.network(self.normalise(pixels).contiguous(memory_format=self.memory_format))
        loss: tuple[Tensor, dict[str, Tensor]] = self.objective(outputs, teacher, labels, progress=progress, mix=mix)
        return loss

    @torch.no_grad()
    def _place_teacher_head(self) -> None:
        """logits = W_T P f + b_T, with the projector as it is now."""
        match = self.objective.penultimate_match()
        if self.teacher_head is None or match is None or self.head_name is None:
            return
        last = self.module.get_submodule(self.head_name).requires_grad_(False)
        assert isinstance(last, nn.Linear), last
        weight, projector = self.teacher_head.weight, match[1].projector
        last.weight.copy_(weight if projector is None else weight @ projector.weight)
        last.bias.copy_(self.teacher_head.bias)

    @contextmanager
    def _sync_gradients(self, sync: bool) -> Iterator[None]:
        """Ranks average their gradients once per step: after the last part of the batch."""
        if sync or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            yield
            return
        with self.wrapped.no_sync():
            yield

    @contextmanager
    def _own_rng_state(self) -> Iterator[None]:
        """Dropout and the like draw from this member's random state, not from the global one."""
        device = self.world.device
        global_state = torch.get_rng_state()
        torch.set_rng_state(self.rng_state["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.rng_state["cuda"], device)
        try:
            yield
        finally:
            self.rng_state["cpu"] = torch.get_rng_state()
            torch.set_rng_state(global_state)
            if device.type == "cuda":
                self.rng_state["cuda"] = torch.cuda.get_rng_state(device)

    # -- the losses of an epoch so far --------------------------------------------------------------------------------

    def _add_to_sums(self, values: Mapping[str, Tensor], rows: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.float() * rows
        self.rows += rows

    def loss_sums(self) -> tuple[dict[str, float], int]:
        return {name: float(total) for name, total in self.sums.items()}, self.rows

    def add_loss_sums(self, sums: Mapping[str, float], rows: int) -> None:
        for name, total in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.tensor(total, device=self.world.device)
        self.rows += rows

    def reset_loss_sums(self) -> None:
        self.sums, self.rows = {}, 0

    def loss_means(self) -> dict[str, float]:
        return {name: float(total) / self.rows for name, total in self.sums.items()} if self.rows else {}

    @property
    def loss_diverged(self) -> bool:
        """Whether a loss of this epoch was not finite; then the sum is not finite either."""
        return bool(self.rows) and not bool(self.sums["loss"].isfinite())

    @property
    def weights_finite(self) -> bool:
        """Running statistics of batch norms and parameters of losses included."""
        tensors = [*self.module.state_dict().values(), *self.objective.parameters()]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    # -- what is saved ------------------------------------------------------------------------------------------------

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
            "teacher_head": None if self.teacher_head is None else tuple(self.teacher_head),
            "noise": self.rng_state,
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "sums": self.sums,
            "rows": self.rows,
        }

    def refuse_more_epochs(self, saved: int, epochs: int) -> None:
        """Refuse to go on to `epochs` where the epochs up to `saved` would have been trained in another way."""
        term = self.objective.follows_the_end
        if self.optim.sched in ("cosine", "onecycle"):
            reason = f"the learning rate of --sched {self.optim.sched} depends on the number of epochs"
        elif term is not None:
            reason = f"the loss {term!r} changes with the share of the epochs that is done"
        else:
            return
        raise SpecMismatch(
            f"{self.options.out} holds a run of {saved} epochs that cannot be continued to {epochs}: {reason}; use "
            "another --out"
        )

    def load(self, state: Mapping[str, Any], epoch: int, batch: int) -> None:
        """Restore the state that rank 0 saved after `batch` batches of `epoch`.

        Rank 0 also restores its sums and random states. The other ranks derive new random states from the position; so
        does rank 0 for a type of device that the saved run had not.
        """
        self.module.load_state_dict(state["module"])
        self.objective.load_state_dict(state["objective"])
        self._load_optimizer(state["optimizer"])
        if state["scaler"]:  # it is empty where the earlier part of the run did not scale
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.teacher_head is not None:
            self.teacher_head = Head(*(tensor.to(self.world.device) for tensor in state["teacher_head"]))
        self.history = list(state["history"])
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        seed = f"{self.spec.seed} {(epoch, batch)}"
        self.rng_state = initial_rng_state(seed, self.world.rank.rank, self.world.device)
        if self.world.first:
            saved = state["noise"]
            self.rng_state |= {name: saved[name] for name in self.rng_state if name in saved}
            self.sums = {name: total.to(self.world.device) for name, total in state["sums"].items()}
            self.rows = state["rows"]

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Restore the optimiser; which of torch's implementations computes its steps depends on the device of now."""
        implementation = [{"fused": group["fused"]} for group in self.optimizer.param_groups]
        groups = [saved | own for saved, own in zip(state["param_groups"], implementation, strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups})


# Batches, and parts of them, have two sizes that differ by one; a batch and its parts may together have three.
SHAPES = 3


def compiled(network: nn.Module, members: int) -> Any:  # noqa: ANN401  called as the network
    """`network` compiled once for every shape. A graph of dynamic shapes would be slower in every step.

    Members of one architecture family run the same code, and torch keeps few compilations of it by default, beyond
    which it silently stops to compile.
    """
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, SHAPES * members)
    return torch.compile(network, dynamic=False)


def trains_all(needs: Needs, teacher_head: Head | None) -> bool:
    """Whether the loss reaches every trained parameter of a network: all layers before the last one, and that one."""
    last = HEAD_LOGITS in needs.outputs or teacher_head is not None
    return LOGITS in needs.outputs or (PENULTIMATE in needs.layers and last)


def even_parts(count: int, parts: int) -> list[slice]:
    """`count` items in `parts` slices whose sizes differ by at most one; fewer slices if there are fewer items."""
    parts = min(parts, count)
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@contextmanager
def refuse_too_few_rows(rows: int, student: str) -> Iterator[None]:
    """Batch norms of a network whose last feature map is one pixel cannot be trained on a single view."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise Refused(
            f"the batch norms of {student!r} cannot be trained on {rows} views at a time; use a larger --batch-size or "
            "--size, or a smaller --grad-accum"
        ) from None


def initial_rng_state(seed: object, rank: int, device: torch.device) -> dict[str, Tensor]:
    """States of the random generators, a function of the seed and the rank alone."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:8], "little") >> 1
    states = {"cpu": torch.Generator().manual_seed(number).get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(number).get_state()
    return states
