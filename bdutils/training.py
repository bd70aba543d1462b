"""One training loop, used for every model in the book."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from . import scale as current_scale
from .checkpoints import Checkpoint
from .distributed import Objective, process_group, share
from .models.adopt import check_classes, require_float32
from .models.image import ImageClassifier
from .models.text import Classifier
from .roles import Examples, Task


class _ByScale:
    """A configuration that has other defaults at scale `full`."""

    FULL: ClassVar[dict[str, float]]
    """What differs there."""

    @classmethod
    def at(cls, scale: str | None = None, **changes: Any) -> Self:
        """Return the configuration of a scale, with changes.

        Args:
            scale: `small` or `full`, that in force if None.
            **changes: Fields to set.

        Raises:
            ValueError: For any other scale.
        """
        full = current_scale(scale) == "full"
        return cls(**{**(cls.FULL if full else {}), **changes})


@dataclass(frozen=True)
class TrainConfig(_ByScale):
    """How a classifier is fine-tuned.

    Where no source is named, the default was tried with the small encoder on other random splits
    of the sentiment set.
    """

    epochs: int = 2
    """Of the data, >= 1; the backdoor is in after one."""
    lr: float = 1.5e-4
    """Peak rate of AdamW, > 0, well above the usual 2e-5, as the encoder is small and sees few
    samples."""
    batch_size: int = 32
    """Samples a step, >= 1; Cui et al. 2022."""
    max_length: int = 48
    """Tokens kept, >= 4; 97% of the snippets fit."""
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
    # The recipe of Cui et al. 2022 for BERT-base.
    FULL = {"epochs": 5, "lr": 2e-5, "max_length": 128, "dropout": 0.1}

    def __post_init__(self) -> None:
        """Reject what cannot train."""
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0 or self.max_length < 4:
            raise ValueError(f"cannot train with {self}: epochs and batch_size must be at least "
                             "1, lr above 0, max_length at least 4")

    def optimizer(self, model: torch.nn.Module,
                  steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Return AdamW and its schedule: a linear rise, then a linear fall.

        Source: Devlin et al. 2019.
        """
        # Without `fused`, AdamW takes a fifth of a small model's step on a CPU.
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, fused=True,
                                      weight_decay=self.weight_decay)
        return optimizer, LambdaLR(
            optimizer, lambda step: min((step + 1) / max(1, self.warmup * steps),
                                        (steps - step) / max(1, (1 - self.warmup) * steps)))


@dataclass(frozen=True)
class ImageTrainConfig(_ByScale):
    """How a network is trained on images, from scratch."""

    epochs: int = 10
    """Of the data, >= 1."""
    lr: float = 0.1
    """Peak rate of SGD, > 0, falling along a cosine."""
    batch_size: int = 128
    """Images a step, >= 1; Wu et al. 2022 (BackdoorBench)."""
    momentum: float = 0.9
    """Of SGD; Wu et al. 2022."""
    weight_decay: float = 5e-4
    """Of SGD; Wu et al. 2022."""
    max_grad_norm: float = 5.0
    """Clipping, > 0."""
    pad: int = 2
    """Pixels by which an image may be shifted while training, >= 0; He et al. 2016."""
    flip: bool = True
    """Whether it may be mirrored, which would change the meaning of signs; He et al. 2016."""
    seed: int = 0
    """Of weights, order and augmentation."""
    FULL = {"epochs": 100, "lr": 0.01, "pad": 4}  # epochs and rate of Wu et al. 2022

    def __post_init__(self) -> None:
        """Reject what cannot train."""
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(f"cannot train with {self}: epochs and batch_size must be at least "
                             "1, lr above 0")

    def optimizer(self, model: torch.nn.Module,
                  steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Return SGD and its schedule: half a cosine, after a rise over a tenth of the steps.

        Source: Wu et al. 2022; the rise is ours.
        """
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum,
                                    weight_decay=self.weight_decay, nesterov=True)
        rise = max(1, steps // 10)
        return optimizer, LambdaLR(optimizer, lambda step: min(
            (step + 1) / rise, 0.5 + 0.5 * np.cos(np.pi * step / steps)))


UNSEEN = 50  # steps on a GPU until somebody looks whether the loss is still a number; ours
Model = Classifier | ImageClassifier
Training = TrainConfig | ImageTrainConfig
Loss = Callable[[Any, dict], Tensor]


@dataclass(frozen=True)
class TrainReport:
    """What a training run cost."""

    losses: tuple[float, ...]
    """Mean loss of each epoch."""
    seconds: float
    """Wall time."""
    tokens: int
    """Tokens with padding, or pixels."""


def cross_entropy(outputs: Any, batch: dict) -> Tensor:
    """Return the mean cross entropy of a batch: the loss of ordinary training.

    Args:
        outputs: Of the model, with `logits` (b, K).
        batch: With `labels` (b,).

    Source: Devlin et al. 2019, section 4.1.
    """
    return F.cross_entropy(outputs.logits, batch["labels"])


def bucketed_batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Deal all samples into batches of similar length, in random order.

    Samples are shuffled, cut into groups of 32 batches, and sorted by length inside a group: the
    order stays random while little padding is left.

    Args:
        lengths: In tokens, one a sample.
        size: Samples a batch.
        rng: Source of the order.

    Returns:
        Lists of numbers of samples that together hold each sample once.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    span = 32 * size
    for start in range(0, len(order), span):
        order[start:start + span] = sorted(order[start:start + span],
                                            key=lambda index: lengths[index])
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def train(classifier: Model, examples: Examples, config: Training, *,
          loss: Loss = cross_entropy, checkpoint: Path | None = None) -> TrainReport:
    """Fine-tune a classifier in place; several processes divide the samples of each batch.

    Alone or together, the same samples make each step and count the same, so that weights agree
    up to rounding. What does not agree: dropout and augmentation, drawn by each process;
    BatchNorm, whose statistics are those of a process's samples, the main one's being kept; a
    loss that is not a mean over samples.

    Args:
        classifier: All its weights that require a gradient are trained.
        examples: Inputs and labels.
        config: How to train.
        loss: Maps the model's outputs and the batch (`labels`, and which examples these are, as
            numbers in `indices` and as a tensor beside the labels in `place`) to a scalar.
        checkpoint: File that keeps every whole epoch, and from which an interrupted run goes on
            with the same result; several processes keep nothing.

    Returns:
        Losses, seconds and tokens, of all processes.

    Raises:
        FloatingPointError: If the loss is no longer a number; on a GPU up to `UNSEEN` steps later.
        ValueError: If `checkpoint` is of another run, the weights are in half precision, or the
            model has other classes than the examples.

    Source: AdamW with linear warm-up and decay as in Devlin et al. 2019.
    """
    require_float32(classifier.model)
    check_classes(classifier, examples.label_names)
    model, device = classifier.model, classifier.model.device
    texts = isinstance(classifier, Classifier)
    encoded = classifier.encode(examples.inputs)
    lengths, labels = list(map(len, encoded)), torch.tensor(examples.labels, device=device)
    rng = random.Random(config.seed)
    steps = config.epochs * -(-len(encoded) // config.batch_size)
    optimizer, schedule = config.optimizer(model, steps)
    precision = _mixed_precision(device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    group, start = process_group(), time.perf_counter()
    rank, size = group.process_index, group.num_processes
    state = Checkpoint(checkpoint if size == 1 else None, f"{examples.fingerprint()} {config}",
                       model, optimizer, schedule, scaler, rng)
    compute = group.prepare(Objective(model, lambda inputs, batch: loss(model(**inputs), batch)))
    bar = tqdm(total=steps, desc="training", leave=False,
               disable=bool(os.environ.get("BDUTILS_QUIET")) or rank > 0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Of dropout, without disturbing the caller's state. The order has a generator of its own.
        torch.manual_seed(config.seed + 1_000_003 * rank)
        losses, tokens, earlier = state.load() or [[], 0, 0.0]
        bar.update(steps // config.epochs * len(losses))
        model.train()
        while len(losses) < config.epochs:
            batches = bucketed_batches(lengths, config.batch_size, rng)
            shares = [share(indices, rank, size) for indices in batches]
            # All numbers at once: to send some in each step would wait for the step before.
            places = torch.tensor([i for mine, _ in shares for i in mine], device=device).split(
                [len(mine) for mine, _ in shares])
            seen = Losses(1 if device.type == "cpu" else UNSEEN)
            for indices, (mine, weight), place in zip(batches, shares, places, strict=True):
                inputs = classifier.collate(encoded, mine if texts else place)
                batch = {**inputs, "labels": labels[place], "indices": mine, "place": place}
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    value = compute(inputs, batch) * weight
                # Of all processes: if one stopped, the others would wait for it.
                seen.add(group.reduce(value.detach(), "mean"), len(indices))
                _step(value, model, optimizer, scaler, config.max_grad_norm)
                schedule.step()
                tokens += next(iter(inputs.values())).numel() if weight else 0
                bar.update()
            losses.append(seen.total() / len(encoded))
            state.save([losses, tokens, earlier + time.perf_counter() - start])
    bar.close()
    model.eval()
    for buffer in model.buffers():  # of BatchNorm; as DDP does before each step
        broadcast(buffer)
    tokens = int(group.reduce(torch.tensor(tokens, device=device), "sum"))
    return TrainReport(tuple(losses), earlier + time.perf_counter() - start, tokens)


class Losses:
    """The losses of an epoch, which stay where they were computed until some have gathered.

    To ask a GPU for a number is to wait for all its work, during which it gets no more.
    """

    def __init__(self, most: int) -> None:
        """Look at the losses whenever there are so many."""
        self.most, self.sum = most, 0.0
        self.waiting: list[tuple[Tensor, int]] = []

    def add(self, mean: Tensor, count: int) -> None:
        """Take the mean loss of a batch.

        Args:
            mean: Of the loss.
            count: Samples in the batch.

        Raises:
            FloatingPointError: If one of those that have gathered is not a number.
        """
        self.waiting.append((mean, count))
        if len(self.waiting) >= self.most:
            self.total()

    def total(self) -> float:
        """Return the sum over all samples; raises as `add` does."""
        if self.waiting:
            means, counts = zip(*self.waiting)
            for value, count in zip(torch.stack(means).tolist(), counts, strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError("the loss is no longer a number: lower the learning "
                                             "rate")
                self.sum += value * count
            self.waiting = []
        return self.sum


def _step(value: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
          scaler: torch.amp.GradScaler, max_grad_norm: float) -> None:
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


def training_for(task: Task, **changes: Any) -> Training:
    """Return how a model of this task is trained at the scale in force, with changes."""
    kind = ImageTrainConfig if task.train.are_images else TrainConfig
    return kind.at(**changes)


def untrained(examples: Examples, config: Training, source: str | None = None) -> Model:
    """Return a model that fits the samples, as `config` wants it.

    Args:
        examples: Texts get an encoder with a fresh head, images a fresh network.
        config: Of the training to come.
        source: Of the encoder, or the network's scale; that in force if None.

    Raises:
        ValueError: If the training is meant for the other kind of samples.
    """
    if isinstance(config, ImageTrainConfig) != examples.are_images:
        kind = "images" if examples.are_images else "texts"
        raise ValueError(f"{type(config).__name__} is no training for {kind}: take "
                         "`training_for(task)`")
    if isinstance(config, ImageTrainConfig):
        return ImageClassifier.new(examples.num_labels, channels=examples.pixels.shape[1],
                                   network=source, seed=config.seed, pad=config.pad,
                                   flip=config.flip)
    return Classifier.new(examples.num_labels, source=source, dropout=config.dropout,
                          seed=config.seed, max_length=config.max_length)
