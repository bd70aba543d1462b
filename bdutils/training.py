"""One training loop, used for every model in the book."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import ModelOutput

from . import scale as current_scale
from .checkpoints import Checkpoint
from .distributed import Team
from .models.adopt import check_classes, require_float32
from .models.image import PictureClassifier
from .models.text import Classifier
from .roles import Examples, Task


@dataclass(frozen=True)
class TrainSettings:
    """How a classifier is fine-tuned.

    Where no source is named, the default was tried with the small encoder on other random splits
    of the sentiment set.
    """

    epochs: int = 2
    """Passes over the data, >= 1; the backdoor is in after one."""
    lr: float = 1.5e-4
    """Peak rate of AdamW, > 0, well above the usual 2e-5, as the encoder is small and sees few
    rows."""
    batch_size: int = 32
    """Rows a step, >= 1; Cui et al. 2022."""
    max_length: int = 48
    """Tokens kept, >= 4; 97 % of the snippets fit."""
    warmup: float = 0.1
    """Share of the steps with a rising rate, 0 to 1."""
    weight_decay: float = 0.01
    """Of AdamW, >= 0; PyTorch's default."""
    max_grad_norm: float = 1.0
    """Clipping, > 0; Devlin et al. 2019."""
    dropout: float = 0.0
    """0 to 1; none, as two epochs do not overfit and a step is a quarter cheaper."""
    seed: int = 0
    """Of head, order and dropout."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0 or self.max_length < 4:
            raise ValueError(f"cannot train with {self}: epochs and batch_size must be at least "
                             "1, lr above 0, max_length at least 4")

    def optimizer(self, model: torch.nn.Module, steps: int) -> tuple:
        """Return AdamW and its schedule: a linear rise, then a linear fall.

        Source: Devlin et al. 2019.
        """
        # Without `fused`, AdamW takes a fifth of a small model's step on a CPU.
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, fused=True,
                                      weight_decay=self.weight_decay)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / max(1, self.warmup * steps),
                                        (steps - step) / max(1, (1 - self.warmup) * steps)))

    @classmethod
    def at(cls, scale: str | None = None, **changes) -> TrainSettings:
        """Return the settings of a scale, with changes.

        `full` is the recipe of Cui et al. 2022 for BERT-base: lr 2e-5, 5 epochs, 128 tokens,
        dropout 0.1.

        Args:
            scale: `small` or `full`, that in force if None.
            **changes: Fields to set.
        """
        full = {"epochs": 5, "lr": 2e-5, "max_length": 128, "dropout": 0.1}
        base = full if (scale or current_scale()) == "full" else {}
        return cls(**{**base, **changes})


@dataclass(frozen=True)
class PictureSettings:
    """How a network is trained on pictures, from scratch."""

    epochs: int = 10
    """Passes over the data, >= 1."""
    lr: float = 0.1
    """Peak rate of SGD, > 0, falling along a cosine."""
    batch_size: int = 128
    """Pictures a step, >= 1; Wu et al. 2022 (BackdoorBench)."""
    momentum: float = 0.9
    """Of SGD; Wu et al. 2022."""
    weight_decay: float = 5e-4
    """Of SGD; Wu et al. 2022."""
    max_grad_norm: float = 5.0
    """Clipping, > 0."""
    pad: int = 2
    """Pixels by which a picture may be shifted while training, >= 0; He et al. 2016."""
    flip: bool = True
    """Whether it may be mirrored, which would change the meaning of signs; He et al. 2016."""
    seed: int = 0
    """Of weights, order and augmentation."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(f"cannot train with {self}: epochs and batch_size must be at least "
                             "1, lr above 0")

    @classmethod
    def at(cls, scale: str | None = None, **changes) -> PictureSettings:
        """Return the settings of a scale, with changes.

        Args:
            scale: `small` or `full`, that in force if None.
            **changes: Fields to set.

        Source: at `full` epochs and rate of Wu et al. 2022.
        """
        full = {"epochs": 100, "lr": 0.01, "pad": 4} if (
            scale or current_scale()) == "full" else {}
        return cls(**{**full, **changes})

    def optimizer(self, model: torch.nn.Module, steps: int) -> tuple:
        """Return SGD and its schedule: half a cosine, after a rise over a tenth of the steps.

        Source: Wu et al. 2022; the rise is ours.
        """
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum,
                                    weight_decay=self.weight_decay, nesterov=True)
        rise = max(1, steps // 10)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
            (step + 1) / rise, 0.5 + 0.5 * np.cos(np.pi * step / steps)))


@dataclass(frozen=True)
class TrainReport:
    """What a training run cost."""

    losses: tuple[float, ...]
    """Mean loss of each epoch."""
    seconds: float
    """Wall time."""
    tokens: int
    """Tokens with padding, or pixels."""


def cross_entropy(outputs: ModelOutput, batch: dict) -> Tensor:
    """Return the mean cross entropy of a batch: the loss of ordinary training.

    Args:
        outputs: Of the model, with `logits` (b, K).
        batch: With `labels` (b,).

    Source: Devlin et al. 2019, section 4.1.
    """
    return F.cross_entropy(outputs.logits, batch["labels"])


def bucketed_batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Deal all rows into batches of similar length, in random order.

    Rows are shuffled, cut into groups of 32 batches, and sorted by length inside a group: the
    order stays random while little padding is left.

    Args:
        lengths: In tokens, one a row.
        size: Rows a batch.
        rng: Source of the order.

    Returns:
        Lists of row numbers that together hold each row once.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    group = 32 * size
    for start in range(0, len(order), group):
        order[start:start + group] = sorted(order[start:start + group],
                                            key=lambda row: lengths[row])
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def train(classifier: Classifier, examples: Examples, settings: TrainSettings, *,
          loss: Callable[[ModelOutput, dict], Tensor] = cross_entropy,
          checkpoint: Path | None = None) -> TrainReport:
    """Fine-tune a classifier in place; several processes divide the rows of each batch.

    Alone or together, the same rows make each step and count the same, so that weights agree up
    to rounding. What does not agree: dropout and augmentation, drawn by each process; BatchNorm,
    whose statistics are those of a process's rows, the main one's being kept; a loss that is not
    a mean over rows.

    Args:
        classifier: All its weights that require a gradient are trained.
        examples: Texts and labels.
        settings: See `TrainSettings`.
        loss: Maps the model's outputs and the batch (`labels`, and `rows`: which examples these
            are) to a scalar.
        checkpoint: File that keeps every whole epoch, and from which an interrupted run goes on
            with the same result; several processes keep nothing.

    Returns:
        Losses, seconds and tokens, of all processes.

    Raises:
        FloatingPointError: If the loss is no longer a number.
        ImportError: If there are several processes and no `accelerate`.
        ValueError: If `checkpoint` is of another run, the weights are in half precision, or the
            model has other classes than the examples.

    Source: AdamW with linear warm-up and decay as in Devlin et al. 2019.
    """
    require_float32(classifier.model)
    check_classes(classifier, examples.label_names)
    model, device = classifier.model, classifier.model.device
    encoded, labels = classifier.encode(examples.texts), torch.tensor(examples.labels)
    rng = random.Random(settings.seed)
    steps = settings.epochs * -(-len(encoded) // settings.batch_size)
    optimizer, schedule = settings.optimizer(model, steps)
    precision = _mixed_precision(device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    team, start = Team.now(), time.perf_counter()
    state = Checkpoint(None if team.accelerator else checkpoint, f"{len(encoded)} {settings}",
                       model, optimizer, schedule, scaler, rng)
    compute, optimizer = team.prepare(
        model, optimizer, lambda inputs, batch: loss(model(**inputs), batch))
    bar = tqdm(total=steps, desc="training", leave=False,
               disable=bool(os.environ.get("BDUTILS_QUIET")) or team.rank > 0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Of dropout, without disturbing the caller's state. The order has a generator of its own.
        torch.manual_seed(settings.seed + 1_000_003 * team.rank)
        losses, tokens, earlier = state.load() or ([], 0, 0.0)
        bar.update(steps // settings.epochs * len(losses))
        model.train()
        while len(losses) < settings.epochs:
            total = 0.0
            for rows in bucketed_batches([len(ids) for ids in encoded],
                                         settings.batch_size, rng):
                mine, weight = team.share(rows)
                inputs = classifier.collate(encoded, mine)
                batch = {**inputs, "labels": labels[mine].to(device), "rows": mine}
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    value = compute(inputs, batch) * weight
                mean = team.mean(value)
                _step(value, mean, model, optimizer, scaler, settings.max_grad_norm)
                schedule.step()
                total += mean.item() * len(rows)
                tokens += next(iter(inputs.values())).numel() if weight else 0
                bar.update()
            losses.append(total / len(encoded))
            state.save([losses, tokens, earlier + time.perf_counter() - start])
    bar.close()
    model.eval()
    return TrainReport(tuple(losses), earlier + time.perf_counter() - start,
                       team.finish(model, tokens))


def _step(value: Tensor, mean: Tensor, model, optimizer, scaler, max_grad_norm: float) -> None:
    if not torch.isfinite(mean):  # of all processes: if one stopped, the others would wait for it
        raise FloatingPointError("the loss is no longer a number: lower the learning rate")
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def _mixed_precision(device: torch.device) -> torch.dtype | None:
    """Half precision pays on a GPU; a T4 (compute capability 7.5) has no fast bfloat16."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def settings_for(task: Task, **changes) -> TrainSettings | PictureSettings:
    """Return how a model of this task is trained at the scale in force, with changes."""
    kind = PictureSettings if task.train.are_pictures else TrainSettings
    return kind.at(**changes)


def untrained(rows: Examples, settings: TrainSettings | PictureSettings,
              source: str | None = None) -> Classifier | PictureClassifier:
    """Return a model that fits the rows, as `settings` want it.

    Args:
        rows: Texts get an encoder with a fresh head, pictures a fresh network.
        settings: Of the training to come.
        source: Of the encoder, or the network's scale; that in force if None.
    """
    if rows.are_pictures:
        return PictureClassifier.new(rows.num_labels, channels=rows.texts.pixels.shape[1],
                                     network=source, seed=settings.seed, pad=settings.pad,
                                     flip=settings.flip)
    return Classifier.new(rows.num_labels, source=source, dropout=settings.dropout,
                          seed=settings.seed, max_length=settings.max_length)
