"""Several processes that train one model together, such as one for each GPU.

`accelerate launch` (or torchrun) starts the same program several times. Each process takes its
share of every batch, and their gradients are averaged. A program that runs alone is a group of
one, which changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .assets import entry


class Objective(torch.nn.Module):
    """The loss as a module: DDP then sees which weights it needs, even if not all of them."""

    def __init__(self, model: torch.nn.Module, compute: Callable[[dict, dict], Tensor]) -> None:
        """Hold a model and a function that maps inputs and batch to its loss."""
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, inputs: dict, batch: dict) -> Tensor:
        """Return the loss of a batch."""
        return self.compute(inputs, batch)


def process_group() -> Accelerator:
    """Return the group of processes that this one was started in.

    Raises:
        ValueError: If `accelerate` was configured to cut the model up.
    """
    # "no": the training loop chooses the precision itself. A loss may leave weights without a
    # gradient; where none is left, PyTorch warns about the search for them.
    made = Accelerator(cpu=_launched() and not torch.cuda.is_available(), mixed_precision="no",
                       device_placement=False, kwargs_handlers=[
                           DistributedDataParallelKwargs(find_unused_parameters=True)])
    kind = made.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"{kind} is not how models are trained here, where each process holds a "
                         "whole one: start the program by `accelerate launch --multi_gpu`")
    return made


def share(indices: list[int], rank: int, size: int) -> tuple[list[int], float]:
    """Return a process's samples of a batch, and the weight of their mean loss.

    With these weights the mean over processes is the mean over samples, however many each has.

    Args:
        indices: Of the whole batch, at least one.
        rank: Of the process.
        size: Of the group.

    Returns:
        At least one index, since every process must take part in every step; its weight is 0
        where there are fewer samples than processes.
    """
    mine = indices[rank::size]  # not a slice: samples are sorted by length
    return mine or indices[:1], size * len(mine) / len(indices)


def entry_together(name: str, build: Callable[[Path], None], about: dict | None = None) -> Path:
    """Return a cache entry that takes the whole group to build.

    The lock of `entry` would keep out processes that the training waits for. So the main process
    alone asks for the entry and tells the others whether to help; what it writes is kept. Every
    process must ask, and all must see the same cache folder.

    Args:
        name, build, about: As for `assets.entry`.
    """
    told: list[bool] = []
    folder: Path | None = None

    def announced(folder: Path) -> None:
        told.extend(broadcast_object_list([True]))
        build(folder)

    if process_group().is_main_process:
        folder = entry(name, announced, about)
        if not told:
            broadcast_object_list([False])
    elif broadcast_object_list([None])[0]:
        with TemporaryDirectory() as unused:
            build(Path(unused))
    return Path(broadcast_object_list([str(folder)])[0])  # they wait here until it is written


def pick_device() -> torch.device:
    """Return the GPU if there is one, the CPU otherwise; each of several processes has its own."""
    if _launched():
        return process_group().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _launched() -> bool:
    """Some clusters set WORLD_SIZE for every program; only a launcher numbers the processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ
