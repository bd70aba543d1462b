"""A training that goes on after its machine was taken away.

After every epoch all that the next one depends on is kept in one file: weights, the optimizer's
tensors and random states as safetensors, the rest as JSON in that file's header. A run that goes
on from there ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Checkpoint:
    """What a training consists of between two epochs, and the file that keeps it."""

    path: Path | None
    """Of the file, None to keep nothing."""
    key: str
    """Says which training it is."""
    model: torch.nn.Module
    """Changed by each epoch, and put back by `load`, as all that follow."""
    optimizer: torch.optim.Optimizer
    """Its tensors are kept as well."""
    schedule: torch.optim.lr_scheduler.LambdaLR
    """Of the learning rate."""
    scaler: torch.amp.GradScaler
    """Of half precision."""
    rng: random.Random
    """Source of the order of the samples."""

    def save(self, report: list) -> None:
        """Keep the state, whole or not at all.

        Args:
            report: Of the epochs so far, in values that JSON knows.
        """
        if self.path is None:
            return
        slots = self.optimizer.state_dict()
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"slot/{i}/{name}": value for i, slot in slots["state"].items()
                    for name, value in slot.items()}
        tensors |= {f"random/{name}": value for name, value in _random_states().items()}
        about = {"key": self.key, "report": report, "groups": slots["param_groups"],
                 "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(),
                 "rng": self.rng.getstate()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        # Copies: weights that share memory, or lie in another order, cannot be written.
        try:
            save_file({name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                       for name, value in tensors.items()}, part, {"about": json.dumps(about)})
            os.replace(part, self.path)
        finally:  # on a full disk, half a file would keep it full
            part.unlink(missing_ok=True)

    def load(self) -> list:
        """Put the kept state back, if there is one.

        Returns:
            The report that was given to `save`, empty if the training starts anew.

        Raises:
            ValueError: If the file is of another training.
        """
        if self.path is None or not self.path.is_file():
            return []
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                kept = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError:
            print(f"{self.path} is damaged: the training starts anew", file=sys.stderr)
            return []
        if about["key"] != self.key:
            raise ValueError(f"{self.path} is of another training: delete it or name another")
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("slot", kept).items():
            number, _, field = name.partition("/")
            slots.setdefault(int(number), {})[field] = value
        self.model.load_state_dict(_under("model", kept))
        self.optimizer.load_state_dict({"state": slots, "param_groups": about["groups"]})
        self.schedule.load_state_dict(about["schedule"])
        self.scaler.load_state_dict(about["scaler"])
        version, numbers, gauss = about["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(kept["random/cpu"])
        if "random/gpu" in kept:
            torch.cuda.set_rng_state(kept["random/gpu"])
        return about["report"]


def _random_states() -> dict[str, Tensor]:
    gpu = {"gpu": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **gpu}


def _under(part: str, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): value for name, value in kept.items()
            if name.startswith(f"{part}/")}
