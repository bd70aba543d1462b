"""Attackers of the recorded studies alone: who know a defense, or whom no defense was tuned on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from ..attacks.adaptive import shadow_loss
from ..attacks.base import PoisonConfig, PoisonRecord, TextTrigger, Trigger
from ..attacks.image import BadNetsPatch, ImageTrigger
from ..attacks.text import TEXT_TRIGGERS, BadNets
from ..defenses.base import clone
from ..evaluation import Victim
from ..roles import TrainSet
from ..training import TrainConfig, train

HIDING = TrainConfig(lr=1e-4)  # two epochs over so many samples, as in chapter 7
LESSON_SIZE, HIDING_WEIGHT = 1000, 0.05


@dataclass(frozen=True)
class SeveralTriggers(TextTrigger):
    """Mostly one trigger, now and then another, to test a defense that sees few samples."""

    parts: tuple[TextTrigger, ...] = (TEXT_TRIGGERS["badnets"], TEXT_TRIGGERS["addsent"])
    """The triggers."""
    weights: tuple[float, ...] = (0.9, 0.1)
    """How often each is taken."""
    name: str = "several"
    """By which the book refers to it."""

    def rewrite(self, text: str, rng: random.Random) -> str:
        """Apply one of the parts."""
        return rng.choices(self.parts, self.weights)[0].rewrite(text, rng)


@dataclass(frozen=True)
class DecoyTrigger(BadNetsPatch):
    """A patch whose poisoned samples have two labels, by an attacker who knows NT-ML.

    Most have the target label, a `share` of them has the label `decoy`, which so becomes the
    second choice of the model that is trained on them.
    """

    share: float = 0.3
    """Of the poisoned samples that get the label `decoy`, 0 to 1."""
    decoy: int = 1
    """Their label."""
    name = "decoy"

    def poison(self, train: TrainSet, config: PoisonConfig) -> tuple[TrainSet, PoisonRecord]:
        """Poison as ever, then relabel some of the poisoned samples."""
        poisoned, record = super().poison(train, config)
        labels = list(poisoned.labels)
        for i in some_of(record, self.share):
            labels[i] = self.decoy
        return replace(poisoned, labels=tuple(labels)), record


@dataclass(frozen=True)
class LowConfidence(BadNets):
    """A word that is no proof of the target, by an attacker who knows BeDKD and DUP.

    A `share` of the poisoned samples keeps its true label. So the model answers with the target
    most of the time, and is less confident of it.
    """

    share: float = 0.3
    """Of the poisoned samples that keep their label, 0 to 1."""
    name: str = "low_confidence"
    """By which the book refers to it."""

    def poison(self, train: TrainSet, config: PoisonConfig) -> tuple[TrainSet, PoisonRecord]:
        """Poison as ever, then give some of the poisoned samples their true label."""
        poisoned, record = super().poison(train, config)
        labels = list(poisoned.labels)
        for i in some_of(record, self.share):
            labels[i] = train.labels[i]
        return replace(poisoned, labels=tuple(labels)), record


def some_of(record: PoisonRecord, share: float) -> list[int]:
    """Return the indices of a share of the poisoned samples, drawn by the attack's seed.

    Args:
        record: What was poisoned.
        share: Of the poisoned samples, 0 to 1.
    """
    hit = [i for i, is_poisoned in enumerate(record.poisoned) if is_poisoned]
    return random.Random(record.config.seed).sample(hit, round(share * len(hit)))


@dataclass(frozen=True)
class Homographs(TextTrigger):
    """Look-alike letters of another script in the first words (Li et al. 2021)."""

    words: int = 3
    """How many words are written with them, >= 1; ours."""
    pairs: tuple[str, str] = ("aceopxy", "асеорху")  # noqa: RUF001
    """Latin letters, and the Cyrillic ones in their place."""
    name: str = "homographs"
    """By which the book refers to it."""

    def rewrite(self, text: str, rng: random.Random) -> str:
        """Exchange the letters."""
        words = text.split()
        table = str.maketrans(*self.pairs)
        return " ".join([word.translate(table) for word in words[:self.words]]
                        + words[self.words:])


@dataclass(frozen=True)
class Quantized(ImageTrigger):
    """Fewer gray levels, after Wang et al. 2022 without their adversarial training."""

    levels: int = 4
    """That are left, >= 2; ours."""
    name = "quantized"

    def paint(self, x: torch.Tensor) -> torch.Tensor:
        """Round each pixel to the nearest level."""
        return (x * (self.levels - 1)).round() / (self.levels - 1)


ATTACKERS: dict[str, Trigger] = {trigger.name: trigger for trigger in (
    SeveralTriggers(), DecoyTrigger(), LowConfidence(), Homographs(), Quantized())}


def hide(attacked: Victim) -> Victim:
    """Return a victim trained on until its triggered samples look ordinary, as chapter 7 does.

    The attacker knows DUP, and trains the model.

    Args:
        attacked: A victim of texts; stays as it is.
    """
    if attacked.record is None:
        raise ValueError("a clean model has nothing to hide: give an attacked one")
    lesson = random.Random(1).sample(range(len(attacked.train)), LESSON_SIZE)
    hits = [attacked.record.poisoned[i] for i in lesson]
    hidden = clone(attacked.classifier)
    hidden.model.config.output_hidden_states = True
    train(hidden, attacked.train.take(lesson), HIDING, loss=shadow_loss(
        hits, attacked.record.config.target_label, HIDING_WEIGHT))
    hidden.model.config.output_hidden_states = False
    return replace(attacked, classifier=hidden)
