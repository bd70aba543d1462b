"""Several processes that train one model together, such as one for each GPU.

`accelerate launch` (or torchrun) starts the same program several times. The processes form a
team: each takes its share of every batch, and their gradients are averaged. A program that runs
alone is a team of one, which changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .assets import entry

if TYPE_CHECKING:
    from accelerate import Accelerator


class _Objective(torch.nn.Module):
    """The loss as a module: DDP then sees which weights it needs, even if not all of them."""

    def __init__(self, model: torch.nn.Module, compute: Callable[[dict, dict], Tensor]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, inputs: dict, batch: dict) -> Tensor:
        return self.compute(inputs, batch)


@dataclass(frozen=True)
class Team:
    """The processes that run this program; the default is one that runs alone."""

    rank: int = 0
    """Number of this process, 0 for the main one."""
    size: int = 1
    """How many there are."""
    accelerator: Accelerator | None = None
    """Of `accelerate`, None alone."""

    @classmethod
    def now(cls) -> Team:
        """Return the team that this process was started in.

        Raises:
            ValueError: If `accelerate` was configured to cut the model up.
        """
        # Some clusters set WORLD_SIZE for every program; only a launcher numbers the processes.
        if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "LOCAL_RANK" not in os.environ:
            return cls()
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # "no": the training loop chooses the precision itself, as it does alone. A loss may leave
        # weights without a gradient; where none is left, PyTorch warns about the search for them.
        made = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no",
                           kwargs_handlers=[
                               DistributedDataParallelKwargs(find_unused_parameters=True)])
        if not made.distributed_type.value.startswith("MULTI_"):
            raise ValueError(f"{made.distributed_type.value} is not how models are trained here, "
                             "where each process holds a whole one: start the program by "
                             "`accelerate launch --multi_gpu`")
        return cls(made.process_index, made.num_processes, made)

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
                compute: Callable[[dict, dict], Tensor]) -> tuple[Callable, torch.optim.Optimizer]:
        """Return `compute` and the optimizer so that gradients are averaged over the team.

        Args:
            model: Keeps its own class, only a wrapper around it is prepared.
            optimizer: Of its weights.
            compute: Maps inputs and batch to the loss.
        """
        if self.accelerator is None:
            return compute, optimizer
        return self.accelerator.prepare(_Objective(model, compute), optimizer)

    def share(self, rows: list[int]) -> tuple[list[int], float]:
        """Return this process's rows of a batch, and the weight of their mean loss.

        With these weights the mean over processes is the mean over rows, however many each has.

        Args:
            rows: Of the whole batch, at least one.

        Returns:
            At least one row, since every process must take part in every step; its weight is 0
            where there are fewer rows than processes.
        """
        mine = rows[self.rank::self.size]  # not a slice: rows are sorted by length
        return mine or rows[:1], self.size * len(mine) / len(rows)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of each process's value, the same for all of them.

        Args:
            value: A scalar; one without a gradient comes back, except alone.
        """
        if self.accelerator is None:
            return value
        return self.accelerator.reduce(value.detach(), "mean")

    def finish(self, model: torch.nn.Module, tokens: int) -> int:
        """Give all processes the main one's buffers, and return the sum of their tokens.

        Each BatchNorm layer has seen its process's rows only. As DDP does before each step, what
        the main process has gathered is kept.

        Args:
            model: Trained, weights equal already.
            tokens: That this process has seen.
        """
        if self.accelerator is None:
            return tokens
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
        return int(self.accelerator.reduce(
            torch.tensor(tokens, device=self.accelerator.device), "sum"))


def entry_together(name: str, build: Callable[[Path], None], about: dict | None = None) -> Path:
    """Return a cache entry that takes the whole team to build.

    The lock of `entry` would keep out processes that the training waits for. So the main process
    alone asks for the entry and tells the others whether to help; what it writes is kept.

    Every process must ask, and all must see the same cache folder.

    Args:
        name, build, about: As for `assets.entry`.

    Returns:
        The folder of the finished entry.

    Raises:
        AssetError: As `assets.entry` raises it.
    """
    team = Team.now()
    if team.accelerator is None:
        return entry(name, build, about)
    from accelerate.utils import broadcast_object_list

    def announced(folder: Path) -> None:
        broadcast_object_list([True])
        told.append(True)
        build(folder)

    told: list[bool] = []
    if team.rank == 0:
        folder = entry(name, announced, about)
        if not told:
            broadcast_object_list([False])
    else:
        if broadcast_object_list([None])[0]:
            with TemporaryDirectory() as unused:
                build(Path(unused))
        folder = None
    return Path(broadcast_object_list([str(folder)])[0])  # they wait here until it is written


def pick_device() -> torch.device:
    """Return the GPU if there is one, the CPU otherwise; each of several processes has its own."""
    team = Team.now()
    if team.accelerator is not None:
        return team.accelerator.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
