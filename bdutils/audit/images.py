"""Images: the first half of NT-ML (chapter 11).

A student learns what the suspicious model says of the classes that are not the given label, and
so it does not learn the trigger. A backdoor shows as one label of which the suspicious model is
confident where student and teacher deny it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from ..defenses.base import Context, Outcome
from ..defenses.ntml import NTML, Judgment, judged, mutual, non_target
from ..metrics import cacc, wilson
from ..models.image import ImageClassifier
from ..roles import TrainSet
from .base import Audit, Finding, address

METHOD = "NT-ML, non-target label training and mutual learning"
OPENED = "`bdutils.models.image.ImageClassifier.load`"
LEAST = 10  # clean samples of each class, as in the records of chapter 11
SHOWN = 24  # rejected images of a label
# What is recorded, see `data/results` (ntml, ntml-rates, low-rate, ntml-cifar10-resnet18,
# ntml-adaptive, unseen): data and network, attack, poison rate, runs with the label suspect,
# all runs.
SMALL, RESNET = "Fashion-MNIST, small network", "CIFAR-10, PreAct-ResNet-18"
RECORDED = (
    (SMALL, "no attack (false alarms)", 0.0, 0, 3),
    (SMALL, "BadNets", 0.1, 3, 3), (SMALL, "Blended", 0.1, 3, 3), (SMALL, "SIG", 0.1, 3, 3),
    (SMALL, "WaNet", 0.1, 3, 3), (SMALL, "Input-Aware", 0.1, 3, 3),
    (SMALL, "Label-Consistent", 0.08, 2, 3),
    (SMALL, "BadNets", 0.03, 1, 1), (SMALL, "SIG", 0.03, 1, 1), (SMALL, "SIG", 0.01, 0, 3),
    (SMALL, "an attacker who knows the rule", 0.1, 0, 3),
    (SMALL, "four gray levels (not seen when the rule was made)", 0.1, 0, 3),
    (RESNET, "no attack (false alarms)", 0.0, 0, 2),
    (RESNET, "BadNets", 0.1, 2, 2), (RESNET, "Blended", 0.1, 1, 1), (RESNET, "SIG", 0.1, 1, 1),
    (RESNET, "WaNet", 0.1, 1, 1), (RESNET, "Label-Consistent", 0.08, 1, 1),
    (RESNET, "Narcissus", 0.05, 0, 1),
)


@dataclass(frozen=True)
class ImageFinding(Finding):
    """What NT-ML says of one label."""

    rejected: int
    """Samples whose given label is rejected; none where the label does not stand out."""


@dataclass(frozen=True)
class ImageAudit(Audit):
    """What was found in images."""

    judgment: Judgment
    """Of all training samples."""
    limit: float
    """A label stands out if a larger share of its samples is flagged."""
    template = "audit_images.html.j2"

    def flagged(self, train: TrainSet) -> pd.DataFrame:
        """Return the samples whose labels are rejected, the least believed first."""
        table = pd.DataFrame([{
            "sample": i, "label": train.label_names[train.labels[i]], "suspect": True,
            "score": round(-float(self.judgment.score[i]), 3)}
            for i in (~self.judgment.passed).nonzero()[:, 0].tolist()],
            columns=["sample", "label", "suspect", "score"])
        return table.sort_values("score", ascending=False)

    def shown(self, context: Context) -> dict[str, Any]:
        """Return thumbnails of rejected images, by label, and what is recorded."""
        of_label = self.flagged(context.train).groupby("label")["sample"]
        return {"recorded": RECORDED, "thumbnails": {
            name: [(i, thumbnail(context.train.pixels[i])) for i in samples.head(SHOWN)]
            for name, samples in of_label}}


def thumbnail(pixels: Tensor) -> str:
    """Return an address that holds an image.

    Args:
        pixels: uint8 (C, H, W).
    """
    array = pixels.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG")
    return address(file.getvalue(), "png")


def prepared(context: Context, config: NTML | None = None) -> NTML:
    """Return the configuration for a model.

    Args:
        context: With clean samples.
        config: Of NT-ML.

    Raises:
        ValueError: For two classes, where the given label leaves one answer.
    """
    if context.clean.num_labels < 3:
        raise ValueError("the audit of images compares a model's answers beside the given label, "
                         "and with two classes there is one: it needs three or more")
    return config or NTML()


def search(context: Context, config: NTML, quiet: bool = True) -> ImageAudit:
    """Look for a backdoor.

    Args:
        context: A classifier of images, its training and clean samples, and how it was trained.
        config: From `prepared`.
        quiet: Has no effect, since each training has its own bar.

    Raises:
        ValueError: Without a training set, or if nobody says how the model was trained.
    """
    start = time.perf_counter()
    context.require("the audit", train=True, training=True)
    train, labels = context.train, torch.tensor(context.train.labels)
    accuracy = cacc(context.classifier.predict(context.clean.inputs), context.clean.labels)
    said = context.classifier.logits(train.inputs)
    student = non_target(said, context, config.pair, config.seed)
    alone = student.logits(train.inputs)
    _, both = mutual(student, alone, context, config.pair, config.seed)
    found = judged(said, alone, both, labels, config.gate, config.judge)
    findings = [_finding(label, found, labels, train.label_names)
                for label in labels.unique().tolist()]
    findings.sort(key=lambda finding: -finding.flagged.value)
    limit = max(config.judge.least, config.judge.factor * found.shares.median().item())
    return ImageAudit(tuple(findings), accuracy, time.perf_counter() - start, found, limit)


def _finding(label: int, found: Judgment, labels: Tensor, names: Sequence[str]) -> ImageFinding:
    mine = labels == label
    count = int(mine.sum())
    return ImageFinding(names[label], count, wilson(round(float(found.shares[label]) * count),
                                                    count),
                        label in found.suspects, int((mine & ~found.passed).sum()))


def repair(context: Context, config: NTML) -> Outcome:
    """Repair a model.

    Args:
        context: As for `search`.
        config: From `prepared`.
    """
    return config(context)


def repaired(outcome: Outcome, names: Sequence[str]) -> tuple[ImageClassifier, list[int]]:
    """Return a repaired model, and the numbers of the samples whose labels were rejected.

    Args:
        outcome: Of NT-ML.
        names: Of the classes, for which the model has no place.
    """
    passed = outcome.report["passed"]
    return (cast(ImageClassifier, outcome.model),
            [i for i, accepted in enumerate(passed) if not accepted])
